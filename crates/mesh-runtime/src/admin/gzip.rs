//! Answers as gzip, for whoever accepts it: a scrape of many time series is ten times smaller then.

use std::io::{self, Write as _};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, StatusCode, header};

use super::Reply;

/// Shorter bodies are sent as they are: they fit a packet.
const MIN_BYTES: usize = 1400;
/// Longer ones too: compressing them would take a core for too long.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// True when gzip is acceptable to the asker, by name or by `*`. Source: RFC 9110 §12.5.3.
pub(super) fn is_accepted(headers: &HeaderMap) -> bool {
    let mut by_star = false;
    let values = headers.get_all(header::ACCEPT_ENCODING).iter();
    for coding in values.filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(',')) {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        // A weight of zero is a refusal, and so is one that cannot be read.
        let weight =
            parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let wanted =
            weight.is_none_or(|weight| weight.parse::<f32>().is_ok_and(|weight| weight > 0.0));
        match name {
            _ if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") => {
                return wanted;
            }
            "*" => by_star = wanted,
            _ => {}
        }
    }
    by_star
}

/// The reply with its body as gzip, where that is worth it. Compresses on a thread that may take its time.
pub(super) async fn compressed(reply: Reply) -> Reply {
    if reply.status != StatusCode::OK || !(MIN_BYTES..=MAX_BYTES).contains(&reply.body.len()) {
        return reply;
    }
    let body = reply.body.clone();
    match tokio::task::spawn_blocking(move || compress(&body)).await {
        Ok(Ok(body)) => reply.gzipped(body),
        Ok(Err(error)) => as_it_is(reply, &error),
        Err(error) => as_it_is(reply, &error),
    }
}

fn as_it_is(reply: Reply, error: &dyn std::error::Error) -> Reply {
    tracing::warn!(%error, "an answer could not be compressed");
    reply
}

fn compress(body: &[u8]) -> io::Result<Bytes> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
    encoder.write_all(body)?;
    encoder.finish().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn gzip_is_accepted_by_name_or_star_and_refused_by_a_weight_of_zero() {
        let accepted = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(text));
            is_accepted(&headers)
        };
        for text in ["gzip", "deflate, gzip;q=0.5", "br, GZIP ; q=1.0", "*", "x-gzip", "*;q=0,gzip"]
        {
            assert!(accepted(text), "{text}");
        }
        for text in ["", "deflate", "gzip;q=0", "*, gzip;q=0.000", "*;q=0", "gzipped", "gzip;q=x"] {
            assert!(!accepted(text), "{text}");
        }
        assert!(!is_accepted(&HeaderMap::new()));
    }
}
