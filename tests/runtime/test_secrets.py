"""What is a secret, and what only looks like one."""

import pytest

from logitcache.runtime import secrets
from logitcache.runtime.secrets import hide, is_secret, without_secrets

HF = "hf_" + "Ab1" * 11


@pytest.mark.parametrize(
    "name",
    [
        "hf_token",
        "token",
        "HF_TOKEN",
        "api_key",
        "apiKey",
        "API-KEY",
        "openai_api_key",
        "key",
        "password",
        "db_passwd",
        "client_secret",
        "aws_secret_access_key",
        "Authorization",
        "credentials",
        "my_access_token",
        "authToken",
        "secret",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "stop_token_ids",
        "max_num_batched_tokens",
        "tokenizer",
        "tokenizer_mode",
        "tokens_only",
        "pin_tokens",
        "max_tokens",
        "eos_token",
        "bos_token",
        "pad_token",
        "image_token",
        "allowed_token_ids",
        "keep_alive",
        "keys_per_block",
        "",
        "top_k",
    ],
)
def test_names_that_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_secrets_leave_settings_at_every_depth() -> None:
    given = {
        "hf_token": "short",
        "hf_overrides": {"rope_theta": 1e6, "auth": {"x": 1}, "list": [{"api_key": "k", "a": 1}, HF, "plain"]},
        "download_dir": f"https://me:pass@host/x?sig=abc&a=1#{HF}",
        "quantization": HF,
        "stop_token_ids": [1, 2],
        "tokenizer": "meta-llama/Llama-2",
        "enforce_eager": True,
        "none": None,
    }
    assert without_secrets(given) == {
        "hf_overrides": {"rope_theta": 1e6, "list": [{"a": 1}, "plain"]},
        "download_dir": "https://host/x?sig=[hidden]&a=1#[hidden]",
        "stop_token_ids": [1, 2],
        "tokenizer": "meta-llama/Llama-2",
        "enforce_eager": True,
        "none": None,
    }


@pytest.mark.parametrize(
    "secret",
    [
        HF,
        "sk-proj-abcdefghijklmnop1234",
        "ghp_" + "a1B2" * 9,
        "AKIAABCDEFGHIJKLMNOP",
        "glpat-abcdefghij0123456789",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh",
        "Bearer abcdef0123456789",
    ],
)
def test_what_looks_like_a_token_is_hidden(secret: str) -> None:
    assert hide(f"refused {secret}, see the log") == "refused [hidden], see the log"


@pytest.mark.parametrize(
    "text",
    [
        "runs/hf_transformers/x",
        "hf_model",
        "a/b@main: 3",
        "me@host.org",
        "https://host/p?key_count=1",
        "sk-learn",
        "k=3",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert hide(text) == text


def test_secrets_that_were_given_are_hidden_everywhere(monkeypatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    secrets.remember(
        {"hf_token": "opensesame", "extra": {"password": "swordfish", "eos_token": "</s>"}, "api_key": True}
    )
    assert hide("opensesame and swordfish </s>") == "[hidden] and [hidden] </s>"
    assert without_secrets({"note": "opensesame", "text": "it is swordfish"}) == {"text": "it is [hidden]"}
