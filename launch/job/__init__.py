"""Several processes that run one job."""
