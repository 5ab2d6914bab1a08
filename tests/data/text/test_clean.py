"""Cleaning: what is damaged is mended, who is named is hidden, and all else stays as it is."""

from __future__ import annotations

import pytest

from bigtx.config.schema import CleanConfig
from bigtx.data.text.rules import EMAIL, IPV4, IPV6, Cleaner, replace_emails, replace_ip_addresses, unicode_repair


def test_nothing_is_changed_by_default() -> None:
    cleaner = Cleaner(CleanConfig())
    text = "naÃ¯ve me@example.net 8.8.8.8 \x00"
    assert cleaner.is_empty and cleaner.clean(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("naÃ¯ve âœ” caf\u0065\u0301", "naïve ✔ café"),
        ("fish &amp; chips", "fish & chips"),
        ("<b>fish &amp; chips</b>", "<b>fish &amp; chips</b>"),
        ("be\x07ll \x1b[31mred\x1b[0m", "bell red"),
        ("“curly” ﬁne ＷＩＤＥ …\r\nnext\u2028line", "“curly” ﬁne ＷＩＤＥ …\r\nnext\u2028line"),
        ("plain\ttext\r\n", "plain\ttext\r\n"),
    ],
)
def test_damage_is_mended_and_style_kept(text: str, expected: str) -> None:
    pytest.importorskip("ftfy")
    assert unicode_repair()(text) == expected


def test_plain_text_is_passed_over_just_where_ftfy_would_leave_it() -> None:
    ftfy = pytest.importorskip("ftfy")
    repair = unicode_repair()
    for code in range(128):
        text = f"a{chr(code)}b {chr(code)}amp; <{chr(code)}>"
        assert repair(text) == ftfy.fix_text(text, uncurl_quotes=False, fix_line_breaks=False), code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+x@mail.example.co.uk.", f"Write to {EMAIL}."),
        ("<a@b.de>,c_d@e-f.org!", f"<{EMAIL}>,{EMAIL}!"),
        ("josé@müller.fr", EMAIL),
        ("@handle a@b user@localhost 5 @ 3.20", "@handle a@b user@localhost 5 @ 3.20"),
    ],
)
def test_mail_addresses(text: str, expected: str) -> None:
    assert replace_emails(text) == expected
    assert replace_emails(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 8.8.8.8, http://1.2.3.4:80/x", f"from {IPV4}, http://{IPV4}:80/x"),
        ("It was 203.12.7.9.", f"It was {IPV4}."),
        (
            "10.0.0.1 127.0.0.1 192.168.1.1 172.20.0.1 224.0.0.1 100.64.0.9",
            "10.0.0.1 127.0.0.1 192.168.1.1 172.20.0.1 224.0.0.1 100.64.0.9",
        ),
        ("1.2.3 1.2.3.4.5 v1.2.3.4 300.1.1.1 1.1.1.1a", "1.2.3 1.2.3.4.5 v1.2.3.4 300.1.1.1 1.1.1.1a"),
        ("[2a00:1450:4001:81b::200e] 2606:4700::1111", f"[{IPV6}] {IPV6}"),
        ("fe80::1 ::1 fd00::5 std::vector abc::def 12:30:45", "fe80::1 ::1 fd00::5 std::vector abc::def 12:30:45"),
        ("2020:11:12 2a00:1:2:3 2a00::1::2", "2020:11:12 2a00:1:2:3 2a00::1::2"),
    ],
)
def test_public_ip_addresses(text: str, expected: str) -> None:
    assert replace_ip_addresses(text) == expected
    assert replace_ip_addresses(expected) == expected


@pytest.mark.parametrize("run", ["a", "a.", "1.", "1", "a@", "2001:", "@a.", "&"])
def test_no_text_takes_for_ever(run: str) -> None:
    """A quadratic search in two million characters would not end within the suite's time."""
    pytest.importorskip("ftfy")
    cleaner = Cleaner(CleanConfig(repair_unicode=True, replace_emails=True, replace_ip_addresses=True))
    text = run * (2_000_000 // len(run))
    assert cleaner.clean(text + " x@y.zz ").endswith(f" {EMAIL} ")


def test_the_steps_follow_each_other() -> None:
    pytest.importorskip("ftfy")
    cleaner = Cleaner(CleanConfig(repair_unicode=True, replace_emails=True, replace_ip_addresses=True))
    assert cleaner.clean("cafÃ© me&#64;host.org 9.9.9.9") == f"café {EMAIL} {IPV4}"
