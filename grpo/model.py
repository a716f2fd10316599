"""A GPT: one trunk, and a table of heads chosen by mode.

1. A frozen trunk has no gradients and no dropout, whatever `train()` says; the tied lm head is untied when it freezes.
2. `forward` returns logits, scores or features, never a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.config import ModelSection, RewardSection
from grpo.features import feature_width, identity_width, reward_features
from grpo.heads import ClassifierHead, CriticHead, LmHead, RewardHead, RewardOutput, SamplerHead, ScorerHead
from grpo.tokenizer import Vocabulary
from grpo.trunk import Trunk

MODES = {"language_model": "lm", "reward": "reward", "token_classifier": "classifier", "sequence_scorer": "scorer"}
"""Mode -> head that `forward` uses when none is named."""


class GPT(nn.Module):
    """A trunk and the heads of one mode.

    Args:
        model: sizes, attention, positions, and which of critic and sampler a language model has.
        vocabulary: base tokens, [MASK], pad.
        mode: `language_model` (alias `generator`), `reward`, `token_classifier` or `sequence_scorer`.
        block_size: T of training; the number of learned positions.
        reward: layers, pooling and width of the reward head; pooling of the scorer. Its defaults when None.
        num_classes: classes of `token_classifier`.
        gelu: `none` (exact) or `tanh`.
    """

    def __init__(
        self,
        model: ModelSection,
        vocabulary: Vocabulary,
        *,
        mode: str = "language_model",
        block_size: int,
        reward: RewardSection | None = None,
        num_classes: int = 2,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        mode = "language_model" if mode == "generator" else mode
        if mode not in MODES:
            raise ValueError(f"mode must be one of generator, {', '.join(MODES)}, got {mode!r}")
        self.model, self.vocabulary, self.mode, self.block_size = model, vocabulary, mode, block_size
        self.reward, self.num_classes, self.gelu = reward or RewardSection(), num_classes, gelu
        self.trunk = Trunk(model, vocabulary, block_size=block_size, gelu=gelu)
        self.heads = nn.ModuleDict(self._make_heads())

    def _make_heads(self) -> dict[str, nn.Module]:
        width = self.model.n_embd
        if self.mode == "reward":
            for layer in self.reward.layers:
                if layer != -1 and not 1 <= layer <= self.model.n_layer:
                    last = self.model.n_layer
                    raise ValueError(f"reward.layers must be -1 or between 1 and model.n_layer ({last}), got {layer}")
            shape = (width, len(self.reward.layers), self.reward.masked_passes)
            head = RewardHead(
                feature_width(*shape),
                identity=identity_width(*shape),
                reach=self.reward.reach,
                hidden=self.reward.hidden,
                pooling=self.reward.pooling,
                spectral=self.reward.spectral_norm,
            )
            return {"reward": head}
        if self.mode == "token_classifier":
            return {"classifier": ClassifierHead(width, self.num_classes)}
        if self.mode == "sequence_scorer":
            return {"scorer": ScorerHead(width, self.reward.pooling)}
        heads: dict[str, nn.Module] = {"lm": LmHead(self.trunk.wte)}
        if self.model.critic:
            heads["critic"] = CriticHead(width)
        if self.model.sampler:
            heads["sampler"] = SamplerHead(width)
        return heads

    def forward(
        self,
        tokens: Tensor,
        head: str | tuple[str, ...] | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """One trunk pass, routed to a head, or to several that share it.

        Args:
            tokens: [B, T] int64.
            head: a name, several names, or None for the mode's own (lm, reward, classifier, scorer).
            attention_mask: [B, T] bool, True = real token.
            positions: [B, T] bool. Per-token heads are computed only there, in row-major order; heads that pool a text
                pool these tokens (the completion).

        Returns:
            The head's output, or name -> output when several are named. With .. = B, T or, given positions, their
            number M: lm [.., V] logits; critic [..] error logits; sampler [.., C] features conditioned on the
            neighbours in tokens; classifier [.., num_classes] logits; reward [B, 2] = P(natural), P(synthetic);
            scorer [B] in (0, 1).
        """
        if isinstance(head, tuple):
            for name in head:
                self._require(name)
                if name == "reward":
                    raise ValueError("the reward head reads features of its own: ask for it alone")
            hidden = self.encode(tokens, attention_mask)
            return {name: self._route(name, hidden, tokens, attention_mask, positions) for name in head}
        head = head or MODES[self.mode]
        self._require(head)
        if head == "reward":
            mask = _completion(tokens, attention_mask, positions)
            return self.reward_scores(tokens, mask, attention_mask).logits.softmax(dim=-1)
        return self._route(head, self.encode(tokens, attention_mask), tokens, attention_mask, positions)

    def _route(
        self, head: str, hidden: Tensor, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        if head == "scorer":
            return self.heads[head](hidden, _completion(tokens, attention_mask, positions))
        inputs = (hidden, *self.neighbor_embeddings(tokens)) if head == "sampler" else (hidden,)
        if positions is not None:
            inputs = tuple(x[positions] for x in inputs)
        return self.heads[head](*inputs)

    def _require(self, head: str) -> None:
        if head not in self.heads:
            raise ValueError(f"this model (mode {self.mode}) has no head {head!r}; it has: {', '.join(self.heads)}")

    def encode(self, tokens: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """[B, T] -> hidden states [B, T, C] after the final norm; [M, C] at the ascending flat places [M]."""
        return self.trunk(tokens, attention_mask, at=at)

    def critic_scores(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T] -> [B, T] logits of "this token is wrong"."""
        return self.forward(tokens, "critic", attention_mask)

    def reward_scores(
        self, tokens: Tensor, completion_mask: Tensor, attention_mask: Tensor | None = None
    ) -> RewardOutput:
        """The reward head's logits for texts [B, T] and for their tokens."""
        self._require("reward")
        return self.heads["reward"](self.reward_features(tokens, completion_mask, attention_mask), completion_mask)

    def reward_features(self, tokens: Tensor, completion_mask: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, F] frozen features that the reward head reads; see `grpo/features.py`."""
        return reward_features(self.trunk, self.vocabulary, tokens, completion_mask, attention_mask=attention_mask,
                               layers=self.reward.layers, masked_passes=self.reward.masked_passes)

    def embed_known(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., C] token embeddings; zero vectors for what is no text ([MASK], pad, -1 for none)."""
        known = (tokens >= 0) & (tokens < self.vocabulary.base_size)
        return self.trunk.wte(tokens.clamp(min=0)) * known.unsqueeze(-1)

    def neighbor_embeddings(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> left and right neighbours' embeddings, [B, T, C] each; zero at an edge, a [MASK] or a pad."""
        known = self.embed_known(tokens)
        return F.pad(known, (0, 0, 1, -1)), F.pad(known, (0, 0, -1, 1))

    def untie(self, residual: int = 0) -> None:
        """Give the lm head its own copy of the token embedding and, above 0, a residual MLP (see `LmHead.untie`)."""
        self._require("lm")
        self.heads["lm"].untie(residual)

    @property
    def residual(self) -> int:
        """Width of the residual MLP in front of the lm head; 0: none."""
        mlp = self.heads["lm"].residual if "lm" in self.heads else None
        return mlp[0].out_features if mlp is not None else 0

    def freeze_trunk(self) -> None:
        """Stop gradients and dropout below the heads. A tied lm head is untied, for it would train the trunk."""
        if "lm" in self.heads:
            self.untie()
        self.trunk.requires_grad_(False)
        self.trunk.frozen = True
        self.trunk.eval()

    def unfreeze_trunk(self) -> None:
        """Train the trunk again. The lm head stays untied: the two may differ by now."""
        self.trunk.requires_grad_(True)
        self.trunk.frozen = False
        self.trunk.train(self.training)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: of the trunk, of each head, in all, and of those that train."""
        parts = {"trunk": self.trunk, **{f"heads.{name}": head for name, head in self.heads.items()}}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        counts["total"] = sum(counts.values())
        counts["trainable"] = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return counts


def text_logits(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[..., V] -> [..., base_size]: the columns that can be text; [MASK], pad and padding columns come after them."""
    return logits[..., : vocabulary.base_size]


def _completion(tokens: Tensor, attention_mask: Tensor | None, positions: Tensor | None) -> Tensor:
    mask = torch.ones_like(tokens, dtype=torch.bool) if positions is None else positions
    return mask if attention_mask is None else mask & attention_mask
