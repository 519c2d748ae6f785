"""Measuring what came out: quality (`classifier`, `incremental`), cost (`cost`), and the statistics of several seeds (`statistics`)."""
