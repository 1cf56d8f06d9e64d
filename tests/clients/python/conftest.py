"""Where the server is: whoever runs these tests has started it (tests/clients/test_others.py)."""

import os

BASE_URL = os.environ["OPENAI_BASE_URL"]
API_KEY = os.environ["OPENAI_API_KEY"]
os.environ["LANGSMITH_TRACING"] = "false"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # no list of prices from the network
