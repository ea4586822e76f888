"""Where Vast's bootstrap looks for the worker when BACKEND=null: python -m workers.null.worker"""

import sys

from null_worker import main

if __name__ == "__main__":
    sys.exit(main())
