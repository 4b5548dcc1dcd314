"""An executor: what came goes back. It does without the Client API's turns between threads."""

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal


class Echo(Executor):
    def execute(
        self,
        task_name: str,  # noqa: ARG002
        shareable: Shareable,
        fl_ctx: FLContext,  # noqa: ARG002
        abort_signal: Signal,  # noqa: ARG002
    ) -> Shareable:
        weights = from_shareable(shareable).data
        answer = DXO(data_kind=DataKind.WEIGHTS, data=weights, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1})
        return answer.to_shareable()
