"""cohere: rerank."""

import cohere
from common import URL

found = cohere.ClientV2(api_key="none", base_url=URL).rerank(
    model="run", query="red bar", documents=["blue bar", "red bar"], top_n=1
)
assert found.results[0].index == 1
