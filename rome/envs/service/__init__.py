"""The sandbox service: sandboxes and environments over HTTP (`rome sandbox serve`).

Needs the extra `fleet` (fastapi, uvicorn, prometheus_client), which is why nothing here is imported
by `rome.envs`.
"""
