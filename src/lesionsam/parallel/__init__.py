"""Several processes that train one model: collectives, and random draws that do not depend on their number."""
