"""Credit inside a training step: in which forward the policy's attention is read, and the weights that come of it.

The weights of a rollout are those of the policy that wrote it. They are read in TRL's old-log-prob pass where there is
one, else in the training forward itself, so that no forward is added; only head sets that a whole batch must agree on
can cost one. Legend: B rollouts, T completion tokens, N positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlattn.attention.capture import Capture, batch_heads, capture
from rlattn.credit import apply_credit, compute_credit, schedule, scheduled_weights
from rlattn.grpo.credit_log import CreditLog
from rlattn.grpo.masks import mask_tensor
from rlattn.grpo.port import Port
from rlattn.grpo.token_log import TokenLog
from rlattn.types import AttentionOptions, CreditOptions, CreditRule

Masks = Tensor | Sequence[Sequence[bool]] | None  # of the tokens that the policy wrote; None: all of them


class CreditReader:
    """Owns the rule, the head sets, and what is read where.

    Attributes:
        heads: local and global head sets of scope `batch` or `calibrated` (bool, L x H each); None until found.
    """

    def __init__(
        self,
        port: Port,
        rule: CreditRule,
        attention: AttentionOptions,
        options: CreditOptions,
        log: CreditLog,
        token_log: TokenLog | None,
    ):
        self.rule, self.attention, self.options = rule, attention, options
        self.heads: tuple[Tensor, Tensor] | None = None
        self._port, self._log, self._token_log = port, log, token_log
        self._take: Callable[[Tensor], None] | None = None  # gets the weights of the policy's next forward
        self._own: Callable[[], Masks] = lambda: None

    @contextmanager
    def reading(self, take: Callable[[Tensor], None], own: Callable[[], Masks]) -> Iterator[None]:
        """The policy's next forward inside the context is read, and `take` called with its weights_BT.

        Args:
            own: which tokens the policy wrote, asked for when the forward runs.
        """
        self._take, self._own = take, own
        try:
            yield
        finally:
            self._take = None

    @property
    def needs_whole_batch(self) -> bool:
        """Whether head sets are still to be found, over the rollouts of all ranks."""
        scope = self.attention.scope
        return scope == "batch" or (scope == "calibrated" and self.heads is None)

    def shape(self, advantage_BT: Tensor, weights_BT: Tensor) -> Tensor:
        return apply_credit(advantage_BT, weights_BT, self.options.sign)

    def forward(
        self, run: Callable[..., Any], model: Any, attention_mask_BN: Tensor, completion_length: int, **kwargs: Any
    ) -> Any:
        """`run(**kwargs)`, which is TRL's forward of log-probabilities and entropies, read where it is to be."""
        take, self._take = self._take, None  # a pass of the reference policy, which may follow, is not read
        if take is None:
            return run(**kwargs)
        response_BN = attention_mask_BN.clone()
        response_BN[:, :-completion_length] = 0
        response_BN[:, -completion_length:] *= self._own_like(response_BN[:, -completion_length:])
        if getattr(self.rule, "needs_entropy", False):
            kwargs["compute_entropy"] = True
        with capture(model, attention_mask_BN, response_BN, options=self.attention) as captured:
            result = run(**kwargs)
        with self._port.phases.phase("credit"):
            take(self._weights(captured, result[1], completion_length))
        return result

    def _own_like(self, mask_BT: Tensor) -> Tensor:
        own = self._own()
        own_BT = own if isinstance(own, Tensor) else mask_tensor(own, mask_BT, missing=False)
        return own_BT.to(mask_BT.dtype)

    def _weights(self, captured: Capture, entropy_BT: Tensor | None, completion_length: int) -> Tensor:
        """weights_BT of the captured rollouts; what the rule did goes to the metrics."""
        port, mask_BN = self._port, captured.response_mask_BN
        entropy_BN = None
        if entropy_BT is not None:
            entropy_BN = torch.full(mask_BN.shape, torch.nan, device=mask_BN.device)
            entropy_BN[:, -completion_length:] = entropy_BT.detach().float()
            entropy_BN = entropy_BN.masked_fill(~mask_BN, torch.nan)
        if self.needs_whole_batch:
            self.heads = batch_heads(port.gather(captured.metrics()[0]), self.attention.share)
        signals = captured.signals(share=self.attention.share, heads=self.heads, entropy_BN=entropy_BN)
        draw = port.micro_batches * port.ranks + port.rank
        credit = compute_credit(self.rule, signals, step=draw, proven=self._log.proven)
        strength = schedule(port.step, port.max_steps, self.options.warmup, self.options.decay)
        self._log.add(credit, strength)
        weights_BT = scheduled_weights(credit.weights_BN[:, -completion_length:], strength)
        if self._token_log:
            self._token_log.read_signals(signals, weights_BT, self.rule, self.options.sign)
        return weights_BT
