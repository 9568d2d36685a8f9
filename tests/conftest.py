"""Fixtures that several folders of tests share."""

pytest_plugins = ["tests.conftest_databases", "tests.conftest_s3"]
