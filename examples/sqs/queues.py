"""Amazon SQS, or a server that speaks like it: QUEUE, QUEUE-results, and QUEUE-failed."""

import os
import sys
from functools import cache
from typing import Any

import boto3


def connect() -> Any:
    """A client of the server that AWS_ENDPOINT_URL names, and of no other."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        sys.exit("AWS_ENDPOINT_URL is not set: the URL of your region's SQS")
    # Passed explicitly, as not every version reads the variable for SQS.
    return boto3.client("sqs", endpoint_url=endpoint)


@cache
def url_of(sqs: Any, name: str) -> str:
    return sqs.get_queue_url(QueueName=name)["QueueUrl"]


def attributes_of(sqs: Any, url: str, *names: str) -> list[int]:
    attributes = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return [int(attributes[name]) for name in names]
