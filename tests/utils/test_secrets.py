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
        ("ASIA" + "Z9" * 8, HIDDEN),
        ("AKIA" + "A" * 15, "AKIA" + "A" * 15),
        ("hf_" + "a" * 30, HIDDEN),
        *((f"a {start}{'x1' * 15} b", f"a {HIDDEN} b") for start in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
        *((f"a {start}{'x1' * 15} b", f"a {HIDDEN} b") for start in ("github_pat_", "glpat-", "sk-", "xoxb-", "xoxp-")),
        *((f"a {start}{'x1' * 15} b", f"a {HIDDEN} b") for start in ("AIza", "wandb_v1_")),
        ("glpat-x_y-z0123456789abc", HIDDEN),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK is a web token", f"{HIDDEN} is a web token"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nrest", f"{HIDDEN}\nrest"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\ncut off", HIDDEN),
        ("s3://b/k?x=1&X-Amz-Credential=AB/c&X-Amz-Security-Token=D%2F", f"s3://b/k?x=1&{HIDDEN}&{HIDDEN}"),
        ("https://host/k?X-Amz-Security-Token=FwoGZXIvYXdzEJr", f"https://host/k?{HIDDEN}"),
        (
            "https://host/k?sig=a%3D&token=b&access_token=c&api_key=d",
            f"https://host/k?{HIDDEN}&{HIDDEN}&{HIDDEN}&{HIDDEN}",
        ),
        ("gs://b/k?X-Goog-Signature=abc&X-Goog-Date=1", f"gs://b/k?{HIDDEN}&X-Goog-Date=1"),
        ("https://cdn/k?Expires=1&Signature=a~b-c&Key-Pair-Id=K", f"https://cdn/k?Expires=1&{HIDDEN}&Key-Pair-Id=K"),
        ("Authorization: Bearer abcdefghij0123456789", f"Authorization: Bearer {HIDDEN}"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {HIDDEN}"),
        ("the bearer of this letter; basic authorization", "the bearer of this letter; basic authorization"),
        ("https://:hunter2@host/x", f"https://{HIDDEN}@host/x"),
        ("https://host/a@b:c", "https://host/a@b:c"),
        ("--max-tokens 10000000", "--max-tokens 10000000"),
        ("password=1234567 and password=12345678", f"password=1234567 and password={HIDDEN}"),
        ("connect with password=correct-horse", f"connect with password={HIDDEN}"),
        ("a=b password: correct-horse", f"a=b password: {HIDDEN}"),
        ("--shards 10000000 --api-key 0123456789", f"--shards 10000000 --api-key {HIDDEN}"),
        ("run_dir=/home/me/runs/a token=0123456789", f"run_dir=/home/me/runs/a token={HIDDEN}"),
        ('{"password": "correct horse", "x": 1}', f'{{"password": "{HIDDEN}", "x": 1}}'),
        ("{'api_key': 'correct-horse'}", f"{{'api_key': '{HIDDEN}'}}"),
        ("--password='correct horse, staple' x", f"--password='{HIDDEN}' x"),
        ('token="correct horse"', f'token="{HIDDEN}"'),
        ("the token 'correct horse'", "the token 'correct horse'"),
        ("python train.py --wandb-api-key 0123456789 data", f"python train.py --wandb-api-key {HIDDEN} data"),
        ("password: correct-horse", f"password: {HIDDEN}"),
        ("the password was mentioned in train.max_tokens=10B", "the password was mentioned in train.max_tokens=10B"),
    ],
)
def test_texts(text: str, clean: str) -> None:
    assert scrub_text(text) == clean


def test_a_long_text_takes_a_moment() -> None:
    """In a time that grows as the text does; by its square it would be many minutes."""
    for text in ("a" * 100_000, "a." * 50_000, "a " * 50_000, "a=" * 50_000, "-" * 100_000):
        assert scrub_text(text) == text


def test_a_variable_is_hidden_in_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, in a URL and in JSON; also under names that mean a secret only among variables."""
    monkeypatch.setenv("SERVICE_PASSWORD", 'a b/c"d@efg')
    assert scrub_text('x a b/c"d@efg y') == f"x {HIDDEN} y"
    assert scrub_text("https://host/a%20b%2Fc%22d%40efg/x") == f"https://host/{HIDDEN}/x"
    assert scrub_text('{"a": "a b/c\\"d@efg"}') == f'{{"a": "{HIDDEN}"}}'
    monkeypatch.setenv("OPENAI_KEY", "a-key-of-a-service")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "Endpoint=x;Account=y")
    assert scrub_text("a-key-of-a-service, Endpoint=x;Account=y") == f"{HIDDEN}, {HIDDEN}"


def test_a_secret_that_contains_another_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the variables; a short value is a word, and the working folder is none."""
    for short, long in (("A_TOKEN", "B_TOKEN"), ("B_TOKEN", "A_TOKEN")):
        monkeypatch.setenv(short, "12345678")
        monkeypatch.setenv(long, "left-12345678-right")
        assert scrub_text("x left-12345678-right y 12345678 z") == f"x {HIDDEN} y {HIDDEN} z"
        assert scrub({"a": ["left-12345678-right"]}) == {"a": [HIDDEN]}
    monkeypatch.setenv("SHORT_PASSWORD", "seven77")
    monkeypatch.setenv("PWD", "/home/somebody")
    assert scrub_text("seven77 in /home/somebody") == "seven77 in /home/somebody"
    monkeypatch.setenv("LONG_PASSWORD", "eight888")
    assert scrub_text("an eight888") == f"an {HIDDEN}"
    assert scrub({"eight888": 1}) == {HIDDEN: 1}, "a key may be one too"
