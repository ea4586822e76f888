"""The client under the name that Vast's examples use: python -m workers.null.client"""

import sys

from null_client import main

if __name__ == "__main__":
    sys.exit(main())
