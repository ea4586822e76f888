"""The command line's worker: `gearman -w` runs this for each job, which it gives on stdin."""

import os
import subprocess
import sys

import job

PORT = os.environ["PORT"]


def put(job_id, what):
    client = ["gearman", "-p", PORT, "-f", "jobs", "-b"]
    subprocess.run(client, input=f"{job_id} {what}", text=True, check=True, stdout=-3)


def count():
    status = ["gearadmin", "--port", PORT, "--status"]
    for line in subprocess.run(status, capture_output=True, text=True).stdout.splitlines():
        name, total, running, *_ = line.split("\t")
        if name == "jobs":
            return [int(total) - int(running), int(running)]
    return []


if __name__ == "__main__":
    if sys.argv[1] == "do":
        job.work(*sys.stdin.read().split())
    else:
        job.answer(put, count)
