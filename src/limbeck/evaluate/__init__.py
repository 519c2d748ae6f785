"""Measuring what came out: quality (`classifier`, `incremental`, generators: `samples`, `features`), cost (`cost`), statistics of seeds (`statistics`)."""
