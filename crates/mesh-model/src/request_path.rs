//! The path of an HTTP request, normalised once for everybody who looks at it.
//!
//! Routes and policies judge the same [`RequestPath`], and it is what goes on to the server: a server that reads
//! `/%61dmin`, `/x/../admin` or `//admin` as `/admin` cannot be reached around a rule about `/admin`.

use std::borrow::Cow;

/// Longest path and query together. Bytes.
pub const MAX_PATH_BYTES: usize = 16 * 1024;

/// How paths are normalised beyond what is always done. The default is strict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PathNormalization {
    /// What `//` means.
    pub empty_segments: EmptySegments,
    /// What `%2F` and `%5C` mean.
    pub encoded_slashes: EncodedSlashes,
    /// What `;` means.
    pub parameters: PathParameters,
}

/// What `//` means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EmptySegments {
    /// The same as `/`.
    #[default]
    Merge,
    /// A segment that is empty.
    Keep,
}

/// What an encoded `/` or `\` means: servers do not agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EncodedSlashes {
    /// The request is refused.
    #[default]
    Refuse,
    /// It is an ordinary character of its segment and stays encoded.
    Keep,
}

/// What `;` in a path means, encoded or not: servers do not agree. Servlet containers take what follows it, up to the next slash,
/// out of the path before they look for what is asked for; nginx and most others take it for a part of the name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PathParameters {
    /// The request is refused.
    #[default]
    Refuse,
    /// It is an ordinary character of its segment. For servers only of which none takes parameters out.
    Keep,
}

/// A request's path in normal form, and its query as it came.
///
/// In normal form a path begins with `/`, or is the `*` of OPTIONS. The characters that may stand in a segment as they are
/// (RFC 3986 `pchar`) are not encoded, all others are, in upper case; there are no `.` and `..` segments and no backslashes.
/// RFC 3986 §6.2.2 decodes unreserved characters only. Servers decode all of them before they compare, so that two
/// spellings of `@` would be two requests here and one there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPath<'r> {
    path: Cow<'r, str>,
    query: Option<&'r str>,
}

/// A path that means different things to different servers, or nothing. The request is refused with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// Longer than [`MAX_PATH_BYTES`].
    #[error("path and query are longer than {MAX_PATH_BYTES} bytes")]
    TooLong,
    /// It neither begins with `/` nor is `*`.
    #[error("the path does not begin with /")]
    NotAbsolute,
    /// A control character, blank, or byte beyond ASCII, as itself or, but for the last two, encoded.
    #[error("the path holds a byte that no path may hold")]
    ForbiddenByte,
    /// What is encoded is no UTF-8: some servers read long forms of `/` and `.` in it, others anything.
    #[error("the path holds encoded bytes that are no UTF-8")]
    NotText,
    /// `;` or `%3B`, under [`PathParameters::Refuse`].
    #[error("the path holds parameters (;), which servers read differently")]
    Parameter,
    /// `%` without two hexadecimal digits.
    #[error("the path holds a % that encodes nothing")]
    BadEscape,
    /// `#`: fragments are not sent.
    #[error("the path holds a fragment")]
    Fragment,
    /// `%2F` or `%5C`, under [`EncodedSlashes::Refuse`].
    #[error("the path holds an encoded slash")]
    EncodedSlash,
    /// `..` leads beyond the root.
    #[error("the path leads above its root")]
    AboveRoot,
    /// `.;` or `..;`: some servers drop what follows the semicolon and then obey the dots.
    #[error("the path holds a dot segment with parameters")]
    DotParameter,
}

impl<'r> RequestPath<'r> {
    /// Normalises a request target in origin form: path, and query if there is one.
    pub fn parse(target: &'r str, rules: PathNormalization) -> Result<Self, InvalidPath> {
        if target.len() > MAX_PATH_BYTES {
            return Err(InvalidPath::TooLong);
        }
        if target.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(InvalidPath::ForbiddenByte);
        }
        if target.contains('#') {
            return Err(InvalidPath::Fragment);
        }
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        if path == "*" {
            return Ok(Self { path: Cow::Borrowed(path), query });
        }
        if !path.starts_with('/') {
            return Err(InvalidPath::NotAbsolute);
        }
        if rules.parameters == PathParameters::Refuse && path.contains(';') {
            return Err(InvalidPath::Parameter);
        }
        let ordinary = path.bytes().all(|byte| byte == b'/' || is_plain(byte))
            && !path.contains("/.")
            && (rules.empty_segments == EmptySegments::Keep || !path.contains("//"));
        let path = if ordinary {
            Cow::Borrowed(path)
        } else {
            Cow::Owned(without_dots(&decoded(path, rules)?, rules)?)
        };
        Ok(Self { path, query })
    }

    /// The path in normal form.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The query without its `?`, as it came; none when there is no `?`.
    #[must_use]
    pub const fn query(&self) -> Option<&'r str> {
        self.query
    }

    /// What goes on to the server.
    #[must_use]
    pub fn target(&self) -> Cow<'_, str> {
        match self.query {
            Some(query) => Cow::Owned(format!("{}?{query}", self.path)),
            None => Cow::Borrowed(&self.path),
        }
    }
}

/// A text that is compared with paths in normal form, or with their beginnings or ends, in their spelling: whatever may
/// stand as it is does, and the rest is encoded in upper case. Segments are left alone, and so is a `%` that encodes nothing.
#[must_use]
pub fn path_text(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|byte| byte == b'/' || is_plain(byte)) {
        return Cow::Borrowed(text);
    }
    let mut spelt = String::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        match (byte, hex(ahead.next()), hex(ahead.next())) {
            (b'%', Ok(high), Ok(low)) => {
                bytes = ahead;
                spell(&mut spelt, high << 4 | low);
            }
            (b'/' | b'%', ..) => spelt.push(byte.into()),
            _ => spell(&mut spelt, byte),
        }
    }
    Cow::Owned(spelt)
}

/// What may stand in a segment as it is: `pchar` of RFC 3986 §3.3.
const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b';'
                | b'='
                | b':'
                | b'@'
        )
}

fn spell(into: &mut String, byte: u8) {
    if is_plain(byte) {
        into.push(byte.into());
        return;
    }
    into.push('%');
    into.extend(
        [byte >> 4, byte & 15]
            .map(|digit| char::from(if digit < 10 { b'0' + digit } else { b'A' + digit - 10 })),
    );
}

/// Decodes what need not be encoded, writes the rest in upper case.
fn decoded(path: &str, rules: PathNormalization) -> Result<String, InvalidPath> {
    let mut decoded = String::with_capacity(path.len());
    let mut beyond_ascii = Vec::new();
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            end_of_text(&mut beyond_ascii)?;
            match byte {
                b'/' | b'\\' => decoded.push('/'),
                _ => spell(&mut decoded, byte),
            }
            continue;
        }
        let (high, low) = (hex(bytes.next())?, hex(bytes.next())?);
        let byte = high << 4 | low;
        if byte.is_ascii() {
            end_of_text(&mut beyond_ascii)?;
        } else {
            beyond_ascii.push(byte);
        }
        if byte.is_ascii_control() {
            return Err(InvalidPath::ForbiddenByte);
        }
        if matches!(byte, b'/' | b'\\') && rules.encoded_slashes == EncodedSlashes::Refuse {
            return Err(InvalidPath::EncodedSlash);
        }
        if byte == b';' && rules.parameters == PathParameters::Refuse {
            return Err(InvalidPath::Parameter);
        }
        spell(&mut decoded, byte);
    }
    end_of_text(&mut beyond_ascii)?;
    Ok(decoded)
}

/// Ends a run of encoded bytes beyond ASCII, which must be text.
fn end_of_text(bytes: &mut Vec<u8>) -> Result<(), InvalidPath> {
    let is_text = std::str::from_utf8(bytes).is_ok();
    bytes.clear();
    if is_text { Ok(()) } else { Err(InvalidPath::NotText) }
}

fn hex(digit: Option<u8>) -> Result<u8, InvalidPath> {
    match digit {
        Some(digit @ b'0'..=b'9') => Ok(digit - b'0'),
        Some(digit @ b'a'..=b'f') => Ok(digit - b'a' + 10),
        Some(digit @ b'A'..=b'F') => Ok(digit - b'A' + 10),
        Some(_) | None => Err(InvalidPath::BadEscape),
    }
}

/// Source: RFC 3986 §5.2.4, but that `..` may not lead beyond the root.
fn without_dots(path: &str, rules: PathNormalization) -> Result<String, InvalidPath> {
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_in_slash = false;
    for segment in path.split('/').skip(1) {
        ends_in_slash = false;
        match segment {
            "" if rules.empty_segments == EmptySegments::Merge => ends_in_slash = true,
            "." => ends_in_slash = true,
            ".." => {
                kept.pop().ok_or(InvalidPath::AboveRoot)?;
                ends_in_slash = true;
            }
            _ if segment.starts_with(".;") || segment.starts_with("..;") => {
                return Err(InvalidPath::DotParameter);
            }
            _ => kept.push(segment),
        }
    }
    let mut normal = String::with_capacity(path.len());
    for segment in kept {
        normal.push('/');
        normal.push_str(segment);
    }
    if ends_in_slash || normal.is_empty() {
        normal.push('/');
    }
    Ok(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENIENT: PathNormalization = PathNormalization {
        empty_segments: EmptySegments::Keep,
        encoded_slashes: EncodedSlashes::Keep,
        parameters: PathParameters::Keep,
    };

    #[test]
    fn paths_have_one_form() {
        for (target, strict, lenient) in [
            ("/", "/", "/"),
            ("/a/b?x=%2F..&y", "/a/b?x=%2F..&y", "/a/b?x=%2F..&y"),
            ("/a?", "/a?", "/a?"),
            ("/%61dmin", "/admin", "/admin"),
            ("/caf%c3%a9", "/caf%C3%A9", "/caf%C3%A9"),
            ("/a/../b", "/b", "/b"),
            ("/a/%2e%2E/b/.", "/b/", "/b/"),
            ("/a/b/..", "/a/", "/a/"),
            ("/.hidden/..a/...", "/.hidden/..a/...", "/.hidden/..a/..."),
            ("//a///b//", "/a/b/", "//a///b//"),
            ("/a//../b", "/b", "/a/b"),
            ("/a\\b\\..\\c", "/a/c", "/a/c"),
            ("/%252e%252e/a", "/%252e%252e/a", "/%252e%252e/a"),
            ("/%40%3a%21%24%26%27%28%29%2a%2B%2C%3d", "/@:!$&'()*+,=", "/@:!$&'()*+,="),
            ("/a|b\"{^}[c]%7c", "/a%7Cb%22%7B%5E%7D%5Bc%5D%7C", "/a%7Cb%22%7B%5E%7D%5Bc%5D%7C"),
            ("/%20%25%3F%23", "/%20%25%3F%23", "/%20%25%3F%23"),
            ("*", "*", "*"),
        ] {
            let normal = |rules| RequestPath::parse(target, rules).unwrap().target().into_owned();
            assert_eq!(normal(PathNormalization::default()), strict, "{target}");
            assert_eq!(normal(LENIENT), lenient, "{target}");
        }
        for (target, kept) in
            [("/a%2f..%5cb", "/a%2F..%5Cb"), ("/a;v=1/b", "/a;v=1/b"), ("/a%3bv=1/b", "/a;v=1/b")]
        {
            assert_eq!(RequestPath::parse(target, LENIENT).unwrap().path(), kept);
        }
        assert_eq!(RequestPath::parse("/a/..%3bx/b", LENIENT), Err(InvalidPath::DotParameter));
    }

    #[test]
    fn texts_are_spelt_as_paths_are() {
        for (text, spelt) in [
            ("/a", "/a"),
            ("/%61%40*", "/a@*"),
            ("/caf\u{e9} b", "/caf%C3%A9%20b"),
            ("/a%2fb%", "/a%2Fb%"),
            ("%", "%"),
            ("%4", "%4"),
            ("/{x}", "/%7Bx%7D"),
        ] {
            assert_eq!(path_text(text), spelt, "{text}");
        }
    }

    #[test]
    fn ambiguous_paths_are_refused() {
        for (target, error) in [
            ("", InvalidPath::NotAbsolute),
            ("a", InvalidPath::NotAbsolute),
            ("**", InvalidPath::NotAbsolute),
            ("http://a/", InvalidPath::NotAbsolute),
            ("/a b", InvalidPath::ForbiddenByte),
            ("/\u{e9}", InvalidPath::ForbiddenByte),
            ("/a?\n", InvalidPath::ForbiddenByte),
            ("/%00", InvalidPath::ForbiddenByte),
            ("/%0d%0a", InvalidPath::ForbiddenByte),
            ("/%", InvalidPath::BadEscape),
            ("/%4", InvalidPath::BadEscape),
            ("/%g1", InvalidPath::BadEscape),
            ("/a#b", InvalidPath::Fragment),
            ("/a%2Fb", InvalidPath::EncodedSlash),
            ("/a%5cb", InvalidPath::EncodedSlash),
            ("/..", InvalidPath::AboveRoot),
            ("/a/../../b", InvalidPath::AboveRoot),
            ("/a/..;x/b", InvalidPath::Parameter),
            ("/a;x", InvalidPath::Parameter),
            ("/a%3bx", InvalidPath::Parameter),
            ("/%c0%ae%c0%ae/", InvalidPath::NotText),
            ("/%e9", InvalidPath::NotText),
            ("/%c3a%a9", InvalidPath::NotText),
        ] {
            let found = RequestPath::parse(target, PathNormalization::default());
            assert_eq!(found, Err(error), "{target:?}");
        }
        let long = format!("/{}", "a".repeat(MAX_PATH_BYTES));
        let found = RequestPath::parse(&long, PathNormalization::default());
        assert_eq!(found, Err(InvalidPath::TooLong));
    }
}
