"""The fixtures of all tests. `test_null.py` names them too: each is there once for both."""

pytest_plugins = ["tests.kit.fixtures"]
