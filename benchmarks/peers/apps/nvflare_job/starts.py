"""A component of the server: the start of each round is noted."""

import time
from pathlib import Path

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType


class Starts(FLComponent):
    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:  # noqa: ARG002
        if event_type == AppEventType.ROUND_STARTED:
            with Path(self.file).open("a") as file:
                file.write(f"{time.monotonic()}\n")
