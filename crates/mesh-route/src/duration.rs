//! Durations as the Gateway API writes them. Source: GEP-2257.

use std::time::Duration;

/// Text that is not one to four numbers of one to five digits, each with its unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a duration such as 1h30m or 250ms: {text:?}")]
pub struct InvalidDuration {
    /// What was given, cut to 64 characters.
    pub text: String,
}

/// Reads `1h`, `10m30s`, `250ms`.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidDuration> {
    let invalid = || InvalidDuration { text: text.chars().take(64).collect() };
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let units = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(units);
        parts += 1;
        if !(1..=5).contains(&digits) || parts > 4 {
            return Err(invalid());
        }
        let number: u64 = number.parse().map_err(|_not_a_number| invalid())?;
        total += match unit {
            "h" => Duration::from_secs(number * 3600),
            "m" => Duration::from_secs(number * 60),
            "s" => Duration::from_secs(number),
            "ms" => Duration::from_millis(number),
            _ => return Err(invalid()),
        };
        rest = after;
    }
    if parts == 0 { Err(invalid()) } else { Ok(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("0s", 0),
            ("1h", 3_600_000),
            ("1m30s", 90_000),
            ("99999ms", 99_999),
            ("1h1m1s1ms", 3_661_001),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "1", "s", "1d", "100000s", "1.5s", "-1s", "1s1s1s1s1s", "1 s"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }
}
