"""Passwords and tokens in URLs are found and hidden; whatever else a URL holds is left as it is."""

from __future__ import annotations

import pytest

from schemas.errors import SettingsError
from schemas.parse import parse_settings
from schemas.urls import holds_secret, masked, secrets_in

SECRET = "s3cr3t-Word"

HOLDING = [
    f"ftp://me:{SECRET}@host/caches",
    f"ftp://:{SECRET}@host",
    f"ftp://me:{SECRET}@[::1]:21/caches",
    f"filecache::ftp://me:{SECRET}@host/caches",
    f"zip://inner::https://me:{SECRET}@host/a.zip",
    f"https://{SECRET}@host/caches",
    f"https://host/caches?token={SECRET}",
    f"https://host/caches?a=1&X-Amz-Signature={SECRET}&b=2",
    f"https://account.blob.core.windows.net/c?sv=2022&sig={SECRET}",
    f"https://host/caches?AWSAccessKeyId=AKIA&Signature={SECRET}",
    f"ftp://me:{SECRET}/{SECRET}@host/caches",
    f"ftp://me:a@{SECRET}@host/caches",
    f"https://me:{SECRET}@host/caches?token={SECRET}",
]
PLAIN = [
    "ftp://host/caches", "sftp://me@host:22/caches", "http://host:8080/a@b/caches", "http://[::1]:8080/a@b",
    "abfs://container@account.dfs.core.windows.net/caches", "s3://bucket/a?versionId=7", "https://host/?page=2&q=tok",
    "/data/caches", "../caches", "C:\\caches", "memory://caches/mine",
]  # fmt: skip


@pytest.mark.parametrize("url", HOLDING)
def test_secrets_are_hidden_and_refused_in_settings(url: str) -> None:
    assert holds_secret(url)
    assert SECRET not in masked(url)
    assert SECRET not in masked(f"{url} cannot be used: '{url}' said no\n({url})")
    for secret in secrets_in(url):
        assert secret not in masked(f"login {secret} failed", secrets_in(f"cache push {url} --json")), (
            "quoted elsewhere"
        )
    with pytest.raises(SettingsError, match=r"store\.remote(.|\n)*FSSPEC_FTP_PASSWORD") as caught:
        parse_settings({"store": {"remote": url}})
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.problems)


@pytest.mark.parametrize("url", PLAIN)
def test_other_urls_and_paths_stay(url: str) -> None:
    assert not holds_secret(url)
    assert masked(f"{url} is gone") == f"{url} is gone"
    assert parse_settings({"store": {"remote": url}}).store.remote == url


def test_the_masked_url_still_shows_the_place() -> None:
    assert masked(f"ftp://me:{SECRET}@host/caches?token={SECRET}&a=1") == "ftp://me:***@host/caches?token=***&a=1"
