"""`ft ui`: a local web page to look at data, plan a run, train it and use the result. Starlette is an optional dependency."""
