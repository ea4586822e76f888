"""What one job does, with a model that takes its time to load. Put your own in its place."""

import json
import os
import signal
import time


class Model:
    def __init__(self) -> None:
        time.sleep(2)  # a minute or more, if it is a large one
        print("the model is loaded", flush=True)

    def work(self, body: str) -> str:
        """Do a job; return a line about it. What it raises makes it a try in vain."""
        job = json.loads(body)
        if job["what"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job["what"] == "fail":
            raise RuntimeError("told to fail")
        time.sleep(float(job["what"]))
        return f"{job['id']} done"
