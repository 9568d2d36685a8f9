"""What a version can do, what it forgot, and whether it may serve. Pure but for `suites`."""
