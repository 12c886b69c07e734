"""The bundled tokenizer: lossless lower-case WordPiece, with the vocabulary of a pretrained encoder behind it.

BERT's own pre-tokenizer forgets whether punctuation stood alone or was glued to a word, so its text cannot be put
back together. Here words are split at white space only and glued parts become continuation pieces (`##,`), which
the decoder undoes exactly. Where an encoder's vocabulary is given, only its pieces that occur in the texts are kept,
and each continuation piece that the encoder lacks is listed with the piece whose embedding it starts from.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in id order, and for each the piece of the encoder whose embedding it starts from."""

    pieces: tuple[str, ...]
    origins: tuple[str, ...]


def build_tokenizer(pieces: Iterable[str]) -> Tokenizer:
    """A WordPiece tokenizer over `pieces`; encoding adds [CLS] in front, decoding is exact up to case and spacing."""
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    tokenizer.no_truncation()
    return tokenizer


def choose_vocabulary(texts: Iterable[str], encoder: dict[str, int], size: int) -> Vocabulary:
    """The `size` most frequent pieces of `texts` under the lossless segmentation.

    Candidates are the encoder's pieces and a continuation form of each whole word it has; single characters are
    always kept, so that no word is unknown.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False)
    words = Counter(word for text in texts for word in normalizer.normalize_str(text).split())
    cut = pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")
    glued: Counter[str] = Counter()
    for word, count in words.items():
        for part, (start, _) in cut.pre_tokenize_str(word):
            if start and part in encoder:
                glued["##" + part] += count
    origins = {piece: piece for piece in encoder if piece not in SPECIAL and not piece.startswith("[unused")}
    origins |= {piece: piece[2:] for piece, count in glued.items() if piece not in encoder and count >= 8}
    # An encoder lists "##," but never saw it, since its own pre-tokenizer splits punctuation off.
    origins |= {
        piece: piece[2:] for piece in origins if len(piece) == 3 and not piece[2].isalnum() and piece[2:] in encoder
    }
    characters = {piece for piece in origins if len(piece.removeprefix("##")) == 1}

    def used(candidates: Iterable[str]) -> Counter[str]:
        trial = build_tokenizer([*SPECIAL, *candidates])
        counts: Counter[str] = Counter()
        spelled = list(words)
        for encoding, word in zip(trial.encode_batch(spelled, add_special_tokens=False), spelled, strict=True):
            for piece in encoding.tokens:
                counts[piece] += words[word]
        return counts

    counts = used(origins)
    kept = {piece for piece in characters if counts[piece] or len(piece) == 1 and piece.isascii()}
    kept |= {f"##{c}" for c in kept if not c.startswith("##") and f"##{c}" in origins}
    ranked = [piece for piece, _ in counts.most_common() if piece not in kept and piece not in SPECIAL]
    pieces = sorted(kept) + ranked[: size - len(SPECIAL) - len(kept)]
    return Vocabulary((*SPECIAL, *pieces), (*SPECIAL, *(origins[piece] for piece in pieces)))
