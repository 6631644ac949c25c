"""Builds a cross-encoder that begins as a bi-encoder: before training, its score is nearly the bi-encoder's cosine, to
which the matches of word pieces may be added. The weights of a BERT are set so that it computes this score.

Usually, a cross-encoder begins as an encoder under a new head, and has to learn from nothing how to compare two texts.
Here, the initial weights already compare the mean vectors of query and passage:

* For each attention head, the hidden state has two dimensions more than that of the bi-encoder. One of the two carries
  a mark: m = 1 for a token of the query, and m = -1 for a token of the passage. The other one is 1. LayerNorms scale
  both dimensions alike. For two tokens with marks m and m', each head adds a constant times (m m' - 1 1') to the
  attention logit, where 1 1' is the product of the two tokens' other dimension. The added term is 0 if both tokens are
  in the same text, and negative otherwise.
* Two more dimensions for each head carry a code of the token's word piece. Word pieces with the same stem have the same
  code.
* Four layers are added. The first one is before the layers of the bi-encoder. One of its heads matches word pieces: a
  token of the query attends to the tokens of the passage with the same code, and to [CLS]. The attention to [CLS] is
  such that n tokens with the same code have about the share n / (n + 0.7) of the attention. The head's value is the
  importance of the word piece, such as its idf. So the head computes for each token of the query how well the passage
  matches it, nearly as in BM25.
* The second added layer is after the layers of the bi-encoder. It rounds all marks to 1, 0 or -1.
* The third added layer computes, for each token, the mean of all tokens of the same text. Its LayerNorm scales all
  means to the same length.
* The fourth added layer is the last one. Half of its heads project the query's mean onto d / 2 directions, and the
  other half project the passage's mean onto the same directions. In each direction, its feed-forward network computes
  the product of the two projections u and v from the equation 4 u v = (u + v)^2 - (u - v)^2, where z^2 is nearly
  proportional to gelu(z) + gelu(-z) for small z. The sum of these products, and the mean of the matches of the query's
  tokens, replace the mark. The model's head reads this mark.

Training may change all weights, and the checkpoint has BERT's ordinary architecture. Without importances, the score is
nearly the cosine. It is only "nearly" the cosine, above all because the position ids of the passage begin after the
query.
"""

import math
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from pyterrier_lit import CrossEncoder

APART = 8.0  # how much lower the attention logit of a token of the other text is
MARK = 0.1  # the size of the marks
STEP, STEEP = 4.0, 16.0  # height and steepness of the step that rounds marks
TOLD = 6.0  # the logit by which the last two layers tell marks apart
POOLED, SMALL = 30.0, 0.35  # how far means outweigh the state to which they are added; factor of u and v
READ, SCALE = 3.0, 5.0  # the mark for a cosine of 1; the score for a mark of 1
ADDED = 4  # number of added layers
CODE = 2  # dimensions of the code for each head
SAME = 12.0  # the attention logit of two tokens with the same code
SATURATION = 0.7  # n tokens of the passage that match a token of the query count about n / (n + SATURATION)
SEEN = 0.05  # how large importance is in the state
MATCHED = 3.5  # the mark for a match of importance 1, divided by the number of the query's tokens


def begin(
    folder: str,
    texts: list[str],
    importance: torch.Tensor | None = None,
    stems: torch.Tensor | None = None,
    seed: int = 42,
    **lengths: int,
) -> CrossEncoder:
    """Build a cross-encoder whose score is nearly the cosine of a bi-encoder's vectors, to which matches of word pieces
    are added. The bi-encoder is a BERT. Its vector of a text is the mean of the last hidden states.

    folder: the bi-encoder. texts: some hundred passages, on which the main directions of the vectors and the sizes of
    the states are measured. importance: how much a match of a word piece counts, for each word piece (V,), for example
    its idf, and 0 for special tokens. None: matches do not count. stems: a number for the stem of each word piece (V,),
    less than V; word pieces with the same number match. None: a word piece matches only itself. lengths: query_length
    and doc_length, the maximum lengths of query and passage in tokens.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    sizes, directions = _measured(encoder, tokenizer, texts, seed)
    if importance is None:
        importance = torch.zeros(encoder.config.vocab_size)
    if stems is None:
        stems = torch.arange(encoder.config.vocab_size)
    with tempfile.TemporaryDirectory() as place:
        wide = _Wide(encoder, sizes, directions, importance, stems, tokenizer.cls_token_id, seed)
        wide.model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        student = CrossEncoder.from_backbone(place, device="cpu", **lengths)
        network = student.load().network
    with torch.no_grad():
        network.linear.weight.zero_()
        network.linear.weight[0, wide.marks] = SCALE / wide.heads * wide.signs
    return student


@torch.inference_mode()
def _measured(
    encoder: transformers.BertModel, tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], seed: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Two measurements on the texts. The first is a dict: name of a LayerNorm -> the median standard deviation of its
    input, and "mean" -> that of the texts' mean vectors. The second has the d / 2 main directions of the texts' mean
    vectors, (d / 2, d), rotated so that no direction outweighs the others."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: found.setdefault(name, []).append(given[0]))
        for name, module in encoder.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    vectors = []
    for i in range(0, len(texts), 32):
        batch = tokenizer(texts[i : i + 32], truncation=True, max_length=48, padding=True, return_tensors="pt")
        states, inside = encoder(**batch).last_hidden_state, batch.attention_mask.bool()
        found = {name: [*given[:-1], given[-1][inside]] for name, given in found.items()}
        vectors += [state[mask].mean(0) for state, mask in zip(states, inside, strict=True)]
    for hook in hooks:
        hook.remove()
    sizes = {name: float(torch.cat(given).std(1, correction=0).median()) for name, given in found.items()}
    sizes["mean"] = float(torch.stack(vectors).std(1, correction=0).median())
    half = encoder.config.hidden_size // 2
    main = torch.linalg.svd(F.normalize(torch.stack(vectors), dim=1), full_matrices=False)[2][:half]
    return sizes, _rotation(half, seed) @ main


class _Wide:
    """The wider BERT of the cross-encoder, built from the bi-encoder.

    sizes, directions: as `_measured` returns them. importance, stems: as in `begin`. cls: the id of [CLS].
    """

    def __init__(
        self,
        encoder: transformers.BertModel,
        sizes: dict[str, float],
        directions: torch.Tensor,
        importance: torch.Tensor,
        stems: torch.Tensor,
        cls: int,
        seed: int,
    ):
        self.encoder, self.sizes, self.directions = encoder, sizes, directions
        self.importance = importance / importance.max().clamp(min=1e-9)
        self.seed, self.cls, self.stems = seed, cls, stems
        config = encoder.config
        heads = config.num_attention_heads
        hidden = config.hidden_size + (2 + CODE) * heads
        self.heads, self.head = heads, hidden // heads  # the number of heads, and their width
        # In the bi-encoder: the width of a head, and of the state
        self.part, self.width = config.hidden_size // heads, config.hidden_size
        self.marks = slice(self.width, self.width + heads)
        self.ones = slice(self.marks.stop, self.marks.stop + heads)
        self.codes = slice(self.ones.stop, hidden)
        # The mark of a token of the query. Half of its components are negative, so that the state's mean stays the same
        self.signs = torch.tensor([1.0, -1.0]).repeat(heads // 2)
        ones = torch.ones(heads)
        basis = torch.linalg.qr(torch.cat([torch.stack([self.signs, ones], 1), torch.eye(heads)[:, 2:]], 1))[0].T
        free = torch.cat([basis[2:], basis[1:2]])  # a LayerNorm changes only the last one, as the others have mean 0
        # Three directions of the marks' dimensions: for matches, for a token's importance, and for [CLS]
        padding = (self.width, hidden - self.marks.stop)
        self.of_match, self.of_importance, self.of_cls = F.pad(free[:3], padding)
        wide = transformers.BertConfig.from_dict(
            config.to_dict()
            | {"hidden_size": hidden, "num_hidden_layers": config.num_hidden_layers + ADDED}
            | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        )
        torch.manual_seed(seed)
        self.model = transformers.BertModel(wide, add_pooling_layer=False).eval()
        with torch.no_grad():
            self.embeddings()
            layers = self.model.encoder.layer
            self.match(layers[0])
            for i, layer in enumerate(encoder.encoder.layer):
                self.layer(layers[i + 1], layer, f"encoder.layer.{i}", last=i == config.num_hidden_layers - 1)
            last = encoder.encoder.layer[-1].output.LayerNorm
            self.round(layers[-3])
            self.average(layers[-2], last.weight, last.bias)
            self.compare(layers[-1])

    def embeddings(self) -> None:
        ours, theirs = self.model.embeddings, self.encoder.embeddings
        size = self.sizes["embeddings.LayerNorm"]
        mark = size * MARK
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            weight = getattr(ours, name).weight
            weight.zero_()
            weight[:, : self.width] = getattr(theirs, name).weight
        ours.token_type_embeddings.weight[1, : self.width] = ours.token_type_embeddings.weight[0, : self.width]
        marks = torch.stack([torch.cat([m * self.signs, self.signs]) for m in (1, -1)])
        ours.token_type_embeddings.weight[:, self.width : self.codes.start] = mark * marks
        # The LayerNorm divides by the standard deviation of a token's embedding
        given = theirs.word_embeddings.weight + theirs.token_type_embeddings.weight[0]
        places = theirs.position_embeddings.weight
        stds = (given + places[1:64].mean(0)).std(1, correction=0, keepdim=True)
        stds[self.cls] = (given[self.cls] + places[0]).std(correction=0)
        codes = self.coded(len(given))[self.stems]
        codes[self.importance <= 0] = 0
        ours.word_embeddings.weight[:, self.codes] = MARK * stds * codes
        ours.word_embeddings.weight += MARK * stds * torch.outer(self.importance, self.of_importance)
        ours.word_embeddings.weight[self.cls] += MARK * stds[self.cls] * self.of_cls
        # [CLS] has no mark: it belongs to both texts
        ours.word_embeddings.weight[self.cls, self.width : self.codes.start] -= mark * marks[0]
        self.norm(ours.LayerNorm, theirs.LayerNorm, size, came=mark, last=True)

    def match(self, layer: torch.nn.Module) -> None:
        """Set the weights of the layer that matches word pieces. It writes the importance of the matches of each token
        into the state."""
        own, out, size = layer.attention.self, layer.attention.output, CODE * self.heads
        for to in (own.query, own.key, own.value, out.dense, layer.output.dense):
            to.weight.zero_(), to.bias.zero_()
        self.see_mark(own, 2 * SAME, MARK)
        own.key.weight[self.part :: self.head] *= -1  # so that a token attends less to its own text
        for to in (own.query, own.key):
            to.weight[self.head :] = 0
            to.weight[:size, self.codes] = (SAME * self.head**0.5 / size) ** 0.5 / MARK * torch.eye(size)
        own.query.bias[self.part + 2] = self.head**0.5
        own.key.weight[self.part + 2] = (SAME + math.log(SATURATION)) / MARK * self.of_cls
        own.value.weight[self.part] = self.of_importance / MARK
        out.dense.weight[:, self.part] = SEEN * self.of_match
        self.norm(layer.output.LayerNorm, self.encoder.embeddings.LayerNorm, 1.0)

    def coded(self, number: int) -> torch.Tensor:
        """Random codes, (number, CODE heads). A code has mean 0 and variance 1."""
        drawn = torch.randn(number, CODE * self.heads, generator=torch.Generator().manual_seed(self.seed))
        return F.layer_norm(drawn, drawn.shape[1:], eps=0.0)

    def layer(self, ours: torch.nn.Module, theirs: torch.nn.Module, name: str, last: bool) -> None:
        """Copy a layer of the bi-encoder. last: leave out the weight and bias of the layer's last LayerNorm."""
        own, attention = ours.attention.self, theirs.attention.self
        stretch = (self.head / self.part) ** 0.5  # transformers divides by the root of a head's width
        for to, given, factor in (
            (own.query, attention.query, stretch), (own.key, attention.key, 1.0), (own.value, attention.value, 1.0),
        ):  # fmt: skip
            to.weight.zero_(), to.bias.zero_()
            self.by_head(to.weight)[:, : self.part, : self.width] = factor * given.weight.view(
                self.heads, self.part, self.width
            )
            to.bias.view(self.heads, -1)[:, : self.part] = factor * given.bias.view(self.heads, self.part)
        self.see_mark(own, APART, MARK)
        out, dense = ours.attention.output, theirs.attention.output.dense
        out.dense.weight.zero_(), out.dense.bias.zero_()
        out.dense.weight.view(-1, self.heads, self.head)[: self.width, :, : self.part] = dense.weight.view(
            self.width, self.heads, self.part
        )
        out.dense.bias[: self.width] = dense.bias
        self.norm(out.LayerNorm, theirs.attention.output.LayerNorm, self.sizes[f"{name}.attention.output.LayerNorm"])
        for part in ("intermediate", "output"):
            to, given = getattr(ours, part).dense, getattr(theirs, part).dense
            to.weight.zero_(), to.bias.zero_()
            to.weight[: given.weight.shape[0], : given.weight.shape[1]] = given.weight
            to.bias[: len(given.bias)] = given.bias
        self.norm(ours.output.LayerNorm, theirs.output.LayerNorm, self.sizes[f"{name}.output.LayerNorm"], last=last)

    def round(self, layer: torch.nn.Module) -> None:
        """Set the weights of the layer that rounds marks. Its attention adds nothing to the state."""
        first, second = layer.intermediate.dense, layer.output.dense
        for added in (layer.attention.output.dense, second):
            added.weight.zero_(), added.bias.zero_()
        # For a mark m = MARK x, gelu(16 S x + S) - gelu(16 S x - S) is 2 S if x = 1, S if x = 0, and 0 if x = -1. And
        # gelu(m + S) is nearly m + S. The second matrix divides the difference by S, and subtracts 1 and m: the new
        # mark is 1, 0 or -1
        first.weight[:3] = 0
        first.weight[:2, self.marks] = STEEP * STEP / MARK * self.signs / self.heads
        first.weight[2, self.marks] = self.signs / self.heads
        first.bias[:3] = torch.tensor([STEP, -STEP, STEP])
        rounded = torch.tensor([1 / STEP, -1 / STEP, -1.0])
        second.weight[self.marks, :3] = torch.outer(self.signs, rounded)
        second.bias[self.marks] = (STEP - 1) * self.signs
        size = self.head * self.heads
        layer.output.LayerNorm.weight[:] = (self.width * (size + self.heads)) ** 0.5 / size

    def average(self, layer: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Set the weights of the third added layer. The state of each token becomes the mean of its text's tokens,
        scaled to the same length for all texts.

        weight, bias: those of the bi-encoder's last LayerNorm (d).
        """
        own = self.pool(layer)
        own.query.weight.copy_(TOLD * self.head**0.5 * own.key.weight)
        own.query.bias[:] = 1.0  # not 0, so that the keys can learn which tokens count
        self.by_head(own.value.weight)[:, : self.part, : self.width] = torch.diag(weight).view(
            self.heads, self.part, self.width
        )
        own.value.bias.view(self.heads, -1)[:, : self.part] = bias.view(self.heads, self.part)
        layer.attention.output.LayerNorm.weight[self.marks] = POOLED * self.sizes["mean"]

    def compare(self, layer: torch.nn.Module) -> None:
        """Set the weights of the last layer. It projects the query's mean and the passage's mean onto d / 2 directions,
        and computes the dot product of the two projections. The dot product plus the mean of the matches of the query's
        tokens replaces the mark."""
        own, half = self.pool(layer), self.width // 2
        told = TOLD * self.head**0.5
        of_query = torch.arange(self.heads) < self.heads // 2
        own.query.bias.view(self.heads, -1)[:, self.part] = torch.where(of_query, told, -told)
        both = torch.cat([self.directions, self.directions])
        self.by_head(own.value.weight)[:, : self.part, : self.width] = both.view(self.heads, self.part, -1)
        one = torch.eye(half)
        signed = [(1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1)]  # the signs of u, v and the square
        first = torch.cat([torch.cat([u * one, v * one], 1) for u, v, _ in signed]) * SMALL
        layer.intermediate.dense.weight[: len(first), : self.width] = first
        layer.intermediate.dense.weight[: len(first), self.width :] = 0
        own.value.weight[self.part] = self.of_match  # of the first head, which reads the query
        layer.attention.output.dense.weight[self.marks, self.part] = MATCHED / SEEN * POOLED * self.signs
        product = torch.tensor([sign for _, _, sign in signed]).repeat_interleave(half).float()
        square = (2 / torch.pi) ** 0.5 * SMALL**2  # nearly gelu(z) + gelu(-z) for z = SMALL
        layer.output.dense.weight[self.marks, : len(first)] = (
            READ / (4 * square * half) * torch.outer(self.signs, product)
        )

    def pool(self, layer: torch.nn.Module) -> Any:
        """Set what the last two layers share: the keys are the marks, and the values that the heads read outweigh the
        state. All other weights become 0, but not those of the LayerNorms and of the first half of the MLP. Returns the
        self-attention of the layer."""
        own = layer.attention.self
        for to in (own.query, own.key, own.value, layer.attention.output.dense, layer.output.dense):
            to.weight.zero_(), to.bias.zero_()
        own.key.weight[self.part :: self.head, self.marks] = self.signs / self.heads
        out = layer.attention.output.dense.weight.view(-1, self.heads, self.head)
        out[: self.width, :, : self.part] = POOLED * torch.eye(self.width).view(self.width, self.heads, self.part)
        return own

    def see_mark(self, attention: torch.nn.Module, apart: float, mark: float) -> None:
        """Make all heads attend less to tokens with the other mark: the attention logits of these tokens are lower by
        `apart`. mark: the size of the marks."""
        seen = (apart / 2 * self.head**0.5) ** 0.5 / mark / self.heads * self.signs
        for to in (attention.query, attention.key):
            to.weight[self.part :: self.head, self.marks] = seen
            to.weight[self.part + 1 :: self.head, self.ones] = seen
        attention.key.weight[self.part + 1 :: self.head] *= -1

    def by_head(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.view(self.heads, self.head, -1)

    def norm(
        self, ours: torch.nn.LayerNorm, theirs: torch.nn.LayerNorm, size: float, came: float = MARK, last: bool = False
    ) -> None:
        """Set a LayerNorm. It does to states of this size what the bi-encoder's LayerNorm does, and gives marks the
        size MARK. came: the size of the marks in its input. last: leave out the weight and bias of the bi-encoder's
        LayerNorm."""
        added = (2 + CODE) * self.heads
        all_of_it = ((self.width * size**2 + added * came**2) / (self.width + added)) ** 0.5
        ours.bias.zero_()
        ours.weight[: self.width] = all_of_it / size
        if not last:
            ours.weight[: self.width] *= theirs.weight
            ours.bias[: self.width] = theirs.bias
        ours.weight[self.width :] = all_of_it * MARK / came


def _rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]
