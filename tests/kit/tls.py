"""Workers that are reached over HTTPS, as on Vast: an authority of the tests' own.

Run as a script, it is a worker whose instance has the certificate that the environment names.
"""

import os
import runpy
import ssl
import sys
from pathlib import Path

from null_local import LocalClient

SCRIPT = __file__
WORKER = Path(__file__).parents[2] / "null_worker.py"
ON_INSTANCES = "/etc/instance.crt"  # where Vast puts it, and the framework looks for it
VARIABLE = "INSTANCE_CERTIFICATE_OF_THE_TEST"


class Certificates:
    """An authority, and the certificate that it has issued to all workers of one LocalVast."""

    def __init__(self, folder):
        import trustme  # only now: without it the tests that need it are left out

        self.authority = os.path.join(folder, "root.crt")
        instance = os.path.join(folder, "instance.pem")
        root = trustme.CA()
        root.cert_pem.write_to_path(self.authority)
        root.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(instance)
        self.environment = {"USE_SSL": "true", VARIABLE: instance}


class TrustingClient(LocalClient):
    """The SDK's client, which trusts one authority."""

    def __init__(self, *arguments, authority, **options):
        super().__init__(*arguments, **options)
        self._context = ssl.create_default_context(cafile=authority)

    async def get_ssl_context(self):
        return self._context


def main():
    """Run the worker; the file that the variable names stands in for the instance's."""
    load = ssl.SSLContext.load_cert_chain

    def load_cert_chain(context, certfile, keyfile=None, password=None):
        if certfile == ON_INSTANCES:
            load(context, os.environ[VARIABLE], None, password)
        else:
            load(context, certfile, keyfile, password)

    ssl.SSLContext.load_cert_chain = load_cert_chain
    sys.argv = [str(WORKER)]
    sys.path[0] = str(WORKER.parent)
    runpy.run_path(str(WORKER), run_name="__main__")


if __name__ == "__main__":
    main()
