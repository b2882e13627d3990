//! Sizes, spans and instants as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Text that is no size or span.
#[derive(Debug, thiserror::Error)]
pub enum BadUnit {
    /// Not a size.
    #[error("'{0}' is not a size: write 10GiB, 512MiB, 10G or a number of bytes")]
    Size(String),
    /// Not a span of time.
    #[error("'{0}' is not a time: write 30s, 500ms, 5m or 0")]
    Span(String),
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Bytes from `1GiB`, `512MiB`, `10G`, `4096`. One-letter units are binary too, as in qemu-img and LVM; `GB` is
/// decimal.
pub fn parse_size(text: &str) -> Result<u64, BadUnit> {
    let bad = || BadUnit::Size(text.into());
    let (digits, unit) = split_unit(text);
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => KIB,
        "m" | "mi" | "mib" => MIB,
        "g" | "gi" | "gib" => GIB,
        "t" | "ti" | "tib" => TIB,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    number.checked_mul(scale).ok_or_else(bad)
}

/// A span from `30s`, `500ms`, `5m`, `1h`, `0`; a bare number is seconds.
pub fn parse_span(text: &str) -> Result<Duration, BadUnit> {
    let bad = || BadUnit::Span(text.into());
    let (digits, unit) = split_unit(text);
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(bad()),
    };
    number
        .checked_mul(ms)
        .map(Duration::from_millis)
        .ok_or_else(bad)
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// `10 GiB`, `1.5 GiB`, `512 B`.
pub fn show_size(bytes: u64) -> String {
    let (scale, unit) = match bytes {
        TIB.. => (TIB, "TiB"),
        GIB.. => (GIB, "GiB"),
        MIB.. => (MIB, "MiB"),
        KIB.. => (KIB, "KiB"),
        _ => return format!("{bytes} B"),
    };
    if bytes.is_multiple_of(scale) {
        return format!("{} {unit}", bytes / scale);
    }
    format!("{:.1} {unit}", bytes as f64 / scale as f64)
}

/// `45s`, `12m`, `3h`, `9d`: one unit, for columns.
pub fn show_age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A span as it is written: `60s`, `250ms`, `5m`, `0`.
pub fn show_ms(ms: u64) -> String {
    match ms {
        0 => "0".into(),
        ms if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        ms if ms.is_multiple_of(60_000) && ms > 60_000 => format!("{}m", ms / 60_000),
        ms if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}

/// Milliseconds since 1970 by the machine's clock. For showing, never for deciding: clocks jump.
pub fn wall_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// `2024-02-29T23:59:59.250Z` from milliseconds since 1970.
pub fn show_time(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60,
        ms % 1000
    )
}

/// The date `days` after 1970-01-01, counted in whole years and months.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    // 400 years are always the same number of days; skipping them bounds the loop for any input.
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let mut year = 1970 + days / DAYS_OF_400_YEARS * 400;
    days %= DAYS_OF_400_YEARS;
    loop {
        let len = if leap(year) { 366 } else { 365 };
        if days < len {
            break;
        }
        days -= len;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for len in lengths {
        if days < len {
            break;
        }
        days -= len;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("1GiB", GIB),
            ("512MiB", 512 * MIB),
            ("10G", 10 * GIB),
            ("10 gib", 10 * GIB),
            ("1GB", 1_000_000_000),
            ("4096", 4096),
            ("2T", 2 * TIB),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "10 parsecs", "99999999999T", "0x10"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(show_size(10 * GIB), "10 GiB");
        assert_eq!(show_size(GIB + GIB / 2), "1.5 GiB");
        assert_eq!(show_size(17), "17 B");
    }

    #[test]
    fn spans_read_as_people_write_them() {
        assert_eq!(parse_span("30s").unwrap(), Duration::from_secs(30));
        assert_eq!(parse_span("0").unwrap(), Duration::ZERO);
        assert_eq!(parse_span("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_span("2m").unwrap(), Duration::from_secs(120));
        for text in ["0", "250ms", "60s", "90s", "5m", "2h"] {
            let span = parse_span(text).unwrap();
            assert_eq!(show_ms(span.as_millis() as u64), text);
        }
        assert!(parse_span("soon").is_err());
        assert!(parse_span("18446744073709551615h").is_err());
    }

    #[test]
    fn times_are_shown_in_utc() {
        assert_eq!(show_time(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(show_time(1_709_251_199_250), "2024-02-29T23:59:59.250Z");
        assert_eq!(show_time(946_684_800_000), "2000-01-01T00:00:00.000Z");
        assert_eq!(show_time(1_767_225_599_999), "2025-12-31T23:59:59.999Z");
    }
}
