"""What a rejection means to the people who run the worker. One line a reason."""

from __future__ import annotations

from collections.abc import Mapping

from broker.messages import Reason
from worker_client.core.rejections import MOST_NOT_FINITE

__all__ = ["DIVERGED", "MEANINGS"]

DIVERGED = (
    f"training diverges: the last {MOST_NOT_FINITE} updates held NaN or infinity and were rejected. Lower "
    "worker.learning_rate, set worker.clip_norm, or look for what is wrong in the task's loss or data; then start "
    "this worker again"
)

MEANINGS: Mapping[Reason, str] = {
    Reason.MALFORMED: "it could not be read; is everything between here and there the same release of fedmq?",
    Reason.UNKNOWN_FORMAT: "the aggregator is of another release; use the same one on both sides",
    Reason.NOT_SUPPORTED: "the run cannot use this kind of update: see the detail; use the same release on both sides",
    Reason.TOO_MANY: "this worker's account sends more than one may; look for what else uses it, or ask the operator",
    Reason.TOO_LARGE: "it is larger than any update of the run's model; use the same task, with the same sizes",
    Reason.WRONG_RUN: "it belongs to another run; check --run",
    Reason.NO_USER: "the broker does not vouch for who sent it; use the same release of fedmq on both sides",
    Reason.WRONG_USER: "this worker's account was used in another worker's name; give each an account of its own",
    Reason.WRONG_MODE: "the run wants another of gradient, delta and parameters; the next version's plan says which",
    Reason.MODEL_MISMATCH: "the model differs from the run's; use the same task, with the same sizes",
    Reason.INCOMPLETE: "chunks of it are gone from the outbox: did somebody delete or purge that queue?",
    Reason.NOT_SIGNED: "the run takes signed updates only; set worker.signing_key_file, see docs/signatures.md",
    Reason.BAD_SIGNATURE: "its key is not enrolled for this name, or somebody changed it; ask the run's operator",
    Reason.NO_EXAMPLES: "no examples stand behind it; check the shard",
    Reason.TOO_MANY_EXAMPLES: "the run does not believe so many; check the shard, or ask the operator",
    Reason.NOT_FINITE: "it holds NaN or infinity: training diverged; lower learning_rate or set clip_norm",
    Reason.NORM_TOO_LARGE: "it is longer than the run allows; lower learning_rate or local_steps, or set clip_norm",
    Reason.NORM_UNUSUAL: "it is many times as long as other workers' updates; look for what is wrong in the data",
    Reason.QUARANTINED: "earlier updates of this worker were bad; look for what is wrong, or ask the run's operator",
    Reason.FUTURE_VERSION: "the aggregator does not have the version it starts from: was an older checkpoint restored?",
    Reason.ROLLED_BACK: "the run was taken back to before the version it starts from; the newest is taken next",
    Reason.TOO_STALE: "training took too long, the version is past; the newest is taken next",
    Reason.ROUND_CLOSED: "the round closed before it came; the newest version is taken next",
    Reason.SECOND_IN_ROUND: "this worker has answered the round already; the next version is waited for",
    Reason.WORKER_SHARE: "this worker has its share of the buffer; the next version comes when others have filled it",
    Reason.RUN_DONE: "the run is over",
}
