import subprocess
import sys

import numpy as np
import pytest

from repkit.checks import InputError
from repkit.data.scenes import zero_shot_prompts
from repkit.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

PROMPTS = [prompt for prompts in zero_shot_prompts().values() for prompt in prompts]


@pytest.fixture(scope="module")
def scene_tokenizer() -> Tokenizer:
    return train_tokenizer(PROMPTS, vocab_size=256)


def test_texts_come_back_from_their_tokens(scene_tokenizer):
    token_ids, _ = scene_tokenizer.encode(PROMPTS, max_length=16)
    assert scene_tokenizer.decode(token_ids) == PROMPTS


def test_rows_are_begin_tokens_end_padding(scene_tokenizer):
    token_ids, token_mask = scene_tokenizer.encode(["a red seven", "", PROMPTS[0]], max_length=6)
    assert (token_ids.dtype, token_mask.dtype) == (np.int32, bool)
    assert token_ids.shape == token_mask.shape == (3, 6)
    assert token_mask.sum(axis=1).tolist() == [5, 2, 6]
    assert (token_ids[:, 0] == scene_tokenizer.bos_id).all()
    for ids, mask in zip(token_ids, token_mask, strict=True):
        assert ids[mask][-1] == scene_tokenizer.eos_id
        assert (ids[~mask] == scene_tokenizer.pad_id).all()


def test_every_word_of_the_captions_becomes_one_token(scene_tokenizer):
    words = [prompt.replace(",", " ,").split() for prompt in PROMPTS]
    _, token_mask = scene_tokenizer.encode(PROMPTS, max_length=32)
    assert token_mask.sum(axis=1).tolist() == [len(group) + 2 for group in words]


def test_unknown_characters_become_the_unknown_token(scene_tokenizer):
    token_ids, token_mask = scene_tokenizer.encode(["红", "RED", "red"], max_length=4)
    assert scene_tokenizer.unk_id in token_ids[0]
    np.testing.assert_array_equal(token_ids[1], token_ids[2])
    assert token_mask[1].sum() == 3


def test_training_gives_the_same_file_in_every_process(tmp_path, scene_tokenizer):
    scene_tokenizer.save(tmp_path / "here.json")
    program = (
        "import sys\n"
        "from repkit.data.scenes import zero_shot_prompts\n"
        "from repkit.data.tokenizer import train_tokenizer\n"
        "prompts = [p for group in zero_shot_prompts().values() for p in group]\n"
        "train_tokenizer(prompts, vocab_size=256).save(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there.json")], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_a_saved_tokenizer_encodes_alike(tmp_path, scene_tokenizer):
    scene_tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == scene_tokenizer.vocab_size
    for ours, theirs in zip(scene_tokenizer.encode(PROMPTS, 12), loaded.encode(PROMPTS, 12), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_tokenizer_with_bert_s_special_tokens_is_understood(tmp_path):
    import tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4}
    bert = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    bert.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bert.enable_padding(length=50)
    bert.save(str(tmp_path / "tokenizer.json"))
    token_ids, token_mask = load_tokenizer(tmp_path / "tokenizer.json").encode(["red green"], max_length=6)
    assert token_ids.tolist() == [[2, 4, 1, 3, 0, 0]]
    assert token_mask.tolist() == [[True] * 4 + [False] * 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read tokenizer .*: No such file"),
        ("", "is no tokenizer file"),
        ("{}", "is no tokenizer file"),
        ('{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "has no pad token"),
    ],
    ids=["missing", "empty", "other JSON", "no padding"],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def test_bad_arguments_are_refused(scene_tokenizer):
    with pytest.raises(InputError, match="expected captions to train a tokenizer on, got none"):
        train_tokenizer(["", " "], vocab_size=100)
    with pytest.raises(InputError, match=r"expected vocab_size of at least 9 .* got 8"):
        train_tokenizer(["abcd"], vocab_size=8)
    assert train_tokenizer(["abcd"], vocab_size=9).vocab_size == 9
    with pytest.raises(InputError, match=r"max_length of at least 3 .* got 2"):
        scene_tokenizer.encode(["a"], max_length=2)
