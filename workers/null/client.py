"""The client under the name that Vast's examples use: python -m workers.null.client"""

import os
import runpy

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    runpy.run_path(os.path.join(ROOT, "null_client.py"), run_name="__main__")
