"""Cleaning of single texts: wrongly decoded characters are repaired, personal data is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

from bigtx.config.schema import CleanConfig

EMAIL = "email@example.com"
IPV4 = "192.0.2.1"
IPV6 = "2001:db8::1"
"""The replacements of personal data: names and addresses that are reserved for documentation (RFC 2606, 5737, 3849)."""

# The part before the @ has at most 64 characters (RFC 5321, 4.5.3.1.1); the bound also keeps the search linear.
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,63}")
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![\w.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\.?\w)")
_LIKE_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")  # A quick test that there is none.
# All addresses that are assigned so far start with the bits 001 (RFC 4291, 2.4).
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")

# Not public (RFC 6890 and its updates); our own table, because Python's table changes between releases.
_RESERVED_IPV4 = [
    IPv4Network("0.0.0.0/8"),
    IPv4Network("10.0.0.0/8"),
    IPv4Network("100.64.0.0/10"),
    IPv4Network("127.0.0.0/8"),
    IPv4Network("169.254.0.0/16"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.0.2.0/24"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("198.18.0.0/15"),
    IPv4Network("198.51.100.0/24"),
    IPv4Network("203.0.113.0/24"),
    IPv4Network("224.0.0.0/4"),
    IPv4Network("240.0.0.0/4"),
]
_RESERVED_IPV6 = [IPv6Network("2001:db8::/32"), IPv6Network("3fff::/20")]

# ASCII text with none of these needs no repair: neither entities nor control characters.
_DOUBTFUL_ASCII = re.compile(r"[&\x00-\x08\x0b\x0e-\x1f\x7f]")


class Cleaner:
    """The steps of cleaning that the config switches on, for one text after the other."""

    def __init__(self, config: CleanConfig) -> None:
        """Set up the steps; raises ImportError if a step's package is missing."""
        self._steps: list[Callable[[str], str]] = []
        if config.repair_unicode:
            self._steps.append(unicode_repair())
        if config.replace_emails:
            self._steps.append(replace_emails)
        if config.replace_ip_addresses:
            self._steps.append(replace_ip_addresses)
        self.is_empty = not self._steps

    def clean(self, text: str) -> str:
        """Return the text after all steps."""
        for step in self._steps:
            text = step(text)
        return text


def unicode_repair() -> Callable[[str], str]:
    """Return a function that repairs wrongly decoded text, by ftfy (Speer 2019, doi:10.5281/zenodo.2591652).

    HTML entities are resolved in texts without tags, and terminal escapes, control characters and surrogates are
    removed. The result has the normal form NFC. Quotation marks, ligatures, wide forms and line ends are not changed:
    they are style, not damage.
    """
    from ftfy import TextFixerConfig, fix_text

    config = TextFixerConfig(
        uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, fix_line_breaks=False, explain=False
    )

    def repair(text: str) -> str:
        if text.isascii() and not _DOUBTFUL_ASCII.search(text):
            return text
        return fix_text(text, config)

    return repair


def replace_emails(text: str) -> str:
    """Return the text with mail addresses replaced by EMAIL."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def replace_ip_addresses(text: str) -> str:
    """Return the text with public IP addresses replaced by IPV4 and IPV6; private and reserved ones identify no person
    and stay.
    """
    if _LIKE_IPV4.search(text):
        text = _IPV4.sub(_public_ipv4, text)
    return _IPV6.sub(_public_ipv6, text) if ":" in text else text


def _public_ipv4(match: re.Match[str]) -> str:
    address = IPv4Address(match[0])
    return match[0] if any(address in network for network in _RESERVED_IPV4) else IPV4


def _public_ipv6(match: re.Match[str]) -> str:
    try:
        address = IPv6Address(match[0])
    except AddressValueError:
        return match[0]
    return match[0] if any(address in network for network in _RESERVED_IPV6) else IPV6
