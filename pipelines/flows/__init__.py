"""One short file per deployment. A flow orders steps and links what they leave; the steps do the work."""

from typing import Any

from pipelines.hooks import stop_ray_job

# Every flow that submits Ray jobs stops them when it ends before they do.
STOPS_ITS_JOBS: dict[str, Any] = {"on_cancellation": [stop_ray_job], "on_crashed": [stop_ray_job]}
