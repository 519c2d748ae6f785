"""Measuring what came out: quality (`classifier`, `incremental`, generated samples: `samples`, `features`), cost (`cost`), and the statistics of several seeds (`statistics`)."""
