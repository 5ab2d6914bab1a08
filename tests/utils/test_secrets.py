from __future__ import annotations

import pytest

from bigtx.utils.secrets import HIDDEN, is_secret_key, scrub, scrub_text


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "password",
        "db-passwd",
        "token",
        "auth_token",
        "AWS_SESSION_TOKEN",
        "client_secret",
        "azure_credentials",
        "accessKey",
        "privatekey",
    ],
)
def test_keys_of_secrets(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "max_tokens",
        "sample_tokens",
        "tokenizer",
        "train/tokens",
        "pad_token",
        "pad_token_id",
        "num_kv_heads",
        "keys",
        "tokens_per_second",
        "keep_checkpoints",
        "monkey",
        "author",
        "path",
    ],
)
def test_keys_of_other_things(key: str) -> None:
    assert not is_secret_key(key)


def test_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "value-of-the-service")
    config = {
        "train": {"max_tokens": 10, "token": "abcdefgh", "password": ""},
        "list": ["s3://bucket/key", {"api_key": "k"}, 1.5, None],
        "argv": [
            "run",
            "--api-key",
            "hunter2hunter2",
            "--api-key=hunter2hunter2",
            "track.token=hunter2hunter2",
            "--lr",
            "1",
        ],
        "note": "called with value-of-the-service",
    }
    assert scrub(config) == {
        "train": {"max_tokens": 10, "token": HIDDEN, "password": ""},
        "list": ["s3://bucket/key", {"api_key": HIDDEN}, 1.5, None],
        "argv": ["run", "--api-key", HIDDEN, f"--api-key={HIDDEN}", f"track.token={HIDDEN}", "--lr", "1"],
        "note": f"called with {HIDDEN}",
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:hunter2@host/x", f"https://{HIDDEN}@host/x"),
        ("s3://b/k?X-Amz-Signature=abc123&y=1", f"s3://b/k?{HIDDEN}&y=1"),
        ("key AKIA" + "A" * 16 + " used", f"key {HIDDEN} used"),
        ("hf_" + "a" * 30, HIDDEN),
        ("python train.py --wandb-api-key 0123456789 data", f"python train.py --wandb-api-key {HIDDEN} data"),
        ("password: correct-horse", f"password: {HIDDEN}"),
        ("the password was mentioned in train.max_tokens=10B", "the password was mentioned in train.max_tokens=10B"),
    ],
)
def test_texts(text: str, clean: str) -> None:
    assert scrub_text(text) == clean
