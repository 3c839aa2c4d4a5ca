//! Text to documents: YAML with several documents, and JSON, each within a budget.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::unreadable::whole_fields;

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// YAML, documents separated by `---`.
    Yaml,
    /// JSON, documents one after the other.
    Json,
}

/// One document of a file.
#[derive(Clone, Debug)]
pub struct Document<'a> {
    /// The text it was read from, for finding lines again.
    pub text: &'a str,
    /// How the text is written.
    pub format: Format,
    /// Line of the file on which the text starts, from 1.
    pub first_line: usize,
    /// What it says.
    pub value: Value,
}

/// Text that is no YAML or JSON, or exceeds a bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct InvalidDocument {
    /// Line of the file, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
    /// Fields of a YAML document that are whole all the same; see [`UnreadablePolicy`](super::UnreadablePolicy).
    pub whole_fields: Option<Value>,
}

/// One step into a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// A mapping's key.
    Key(String),
    /// A sequence's index.
    Index(usize),
}

/// Reads every document of a file; one that is broken does not hide the others (YAML).
///
/// Aliases and nesting are bounded: what a document expands to may not exceed twice its own text, and 128 levels.
#[must_use]
pub fn documents(text: &str, format: Format) -> Vec<Result<Document<'_>, InvalidDocument>> {
    match format {
        Format::Yaml => split_yaml(text)
            .into_iter()
            .filter(|(_, part)| !is_blank(part))
            .map(|(first_line, part)| yaml_document(part, first_line))
            .collect(),
        Format::Json => json_documents(text),
    }
}

/// The line of the file on which the field at `path` stands, or its nearest parent that exists.
#[must_use]
pub fn line_of(document: &Document<'_>, path: &[Segment]) -> usize {
    (0..=path.len())
        .rev()
        .find_map(|depth| locate(document, &path[..depth]))
        .map_or(document.first_line, |line| document.first_line + line.saturating_sub(1))
}

fn locate(document: &Document<'_>, path: &[Segment]) -> Option<usize> {
    let found = Cell::new(false);
    let seed = LocateSeed { path, found: &found };
    let line = match document.format {
        Format::Yaml => seed
            .deserialize(serde_norway::Deserializer::from_str(document.text))
            .err()
            .and_then(|error| error.location())
            .map(|location| location.line()),
        Format::Json => seed
            .deserialize(&mut serde_json::Deserializer::from_str(document.text))
            .err()
            .map(|error| error.line()),
    };
    line.filter(|_| found.get())
}

/// Splits at document markers. A line that starts with `---` or `...` is one everywhere, also inside scalars
/// (YAML 1.2 §9.1.2), so that no parser is needed to find it.
fn split_yaml(text: &str) -> Vec<(usize, &str)> {
    let is_marker = |line: &str, marker: &str| {
        line.strip_prefix(marker)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = offset + line.len();
        if is_marker(line, "---") {
            parts.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, index + 1);
        } else if is_marker(line, "...") {
            parts.push((start_line, &text[start..offset]));
            (start, start_line) = (end, index + 2);
        }
        offset = end;
    }
    parts.push((start_line, &text[start..]));
    parts
}

fn is_blank(part: &str) -> bool {
    part.lines()
        .map(|line| line.strip_prefix("---").unwrap_or(line).trim())
        .all(|line| line.is_empty() || line.starts_with(['#', '%']))
}

fn yaml_document(text: &str, first_line: usize) -> Result<Document<'_>, InvalidDocument> {
    yaml_value(text)
        .map(|value| Document { text, format: Format::Yaml, first_line, value })
        .map_err(|error| {
            // What is missing at the end is reported behind it, on a line that the file may not have.
            let last = text.lines().count().max(1);
            let line = error.location().map_or(1, |location| location.line()).min(last);
            InvalidDocument {
                line: first_line + line.saturating_sub(1),
                problem: error.to_string(),
                whole_fields: whole_fields(text, &|part| yaml_value(part).ok()),
            }
        })
}

/// Most brackets that open in one YAML document.
///
/// The parser's time grows with the brackets times how many of them are open (libyaml looks at each level of flow style at
/// each token), and it reads a whole document before its depth can be seen: 100,000 that open and never close would keep it
/// for minutes. Brackets in strings count too, because only the parser knows what is a string. Objects in block style have none.
const MAX_BRACKETS: usize = 10_000;

fn yaml_value(text: &str) -> Result<Value, serde_norway::Error> {
    if text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count() > MAX_BRACKETS {
        return Err(serde_norway::Error::custom(format!(
            "more than {MAX_BRACKETS} brackets open in one YAML document; write it in block style, as several documents, or \
             into a file that ends in .json"
        )));
    }
    let budget = Cell::new(budget_of(text));
    ValueSeed { budget: &budget }.deserialize(serde_norway::Deserializer::from_str(text))
}

fn json_documents(text: &str) -> Vec<Result<Document<'_>, InvalidDocument>> {
    let mut documents = Vec::new();
    let (mut rest, mut first_line) = (text, 1);
    loop {
        let trimmed = rest.trim_start();
        first_line += count_lines(&rest[..rest.len() - trimmed.len()]);
        if trimmed.is_empty() {
            return documents;
        }
        let budget = Cell::new(budget_of(trimmed));
        let mut stream = serde_json::Deserializer::from_str(trimmed).into_iter::<IgnoredAny>();
        let end = match stream.next() {
            Some(Ok(IgnoredAny)) => stream.byte_offset(),
            Some(Err(error)) => {
                documents.push(Err(invalid_json(&error, first_line)));
                return documents;
            }
            None => return documents,
        };
        let (part, after) = trimmed.split_at(end);
        documents.push(
            ValueSeed { budget: &budget }
                .deserialize(&mut serde_json::Deserializer::from_str(part))
                .map(|value| Document { text: part, format: Format::Json, first_line, value })
                .map_err(|error| invalid_json(&error, first_line)),
        );
        first_line += count_lines(part);
        rest = after;
    }
}

fn invalid_json(error: &serde_json::Error, first_line: usize) -> InvalidDocument {
    InvalidDocument {
        line: first_line + error.line().saturating_sub(1),
        problem: error.to_string(),
        whole_fields: None,
    }
}

fn count_lines(text: &str) -> usize {
    text.bytes().filter(|byte| *byte == b'\n').count()
}

/// Without aliases each value takes a byte of text and each string its own length, so that only aliases reach it.
fn budget_of(text: &str) -> usize {
    1_000 + text.len().saturating_mul(2)
}

/// Builds a [`Value`] and pays for each node and string byte.
#[derive(Clone, Copy)]
struct ValueSeed<'b> {
    budget: &'b Cell<usize>,
}

impl ValueSeed<'_> {
    fn pay<E: Error>(self, cost: usize) -> Result<(), E> {
        let left = self.budget.get().checked_sub(1 + cost).ok_or_else(|| {
            E::custom("the document expands to more than twice its text; write out its aliases")
        })?;
        self.budget.set(left);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value without tags")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.pay(0).map(|()| Value::from(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.pay(0).map(|()| Value::from(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.pay(0)?;
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.pay(value.len()).map(|()| Value::from(value))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.pay(0).map(|()| Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        self.pay(0)?;
        let mut map = Map::new();
        while let Some(key) = access.next_key_seed(KeySeed { wanted: None })? {
            self.pay(key.len())?;
            if key == "<<" {
                return Err(A::Error::custom("merge keys are not supported; write the fields out"));
            }
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("the key {key:?} is given twice")));
            }
            let value = access.next_value_seed(self)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Reads a mapping's key as text, as kubectl does (`8080:` is the key "8080"); stops at the `wanted` one.
#[derive(Clone, Copy)]
struct KeySeed<'a> {
    wanted: Option<(&'a str, &'a Cell<bool>)>,
}

impl KeySeed<'_> {
    fn key<E: Error>(self, key: String) -> Result<String, E> {
        match self.wanted {
            Some((wanted, found)) if wanted == key => {
                found.set(true);
                Err(E::custom("found"))
            }
            Some(_) | None => Ok(key),
        }
    }
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<String, E> {
        self.key(value.to_owned())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<String, E> {
        self.key(value.to_string())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<String, E> {
        self.key(value.to_string())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<String, E> {
        self.key(value.to_string())
    }
}

/// Follows `path` and fails on purpose at its end, so that the parser tells the line.
#[derive(Clone, Copy)]
struct LocateSeed<'a> {
    path: &'a [Segment],
    found: &'a Cell<bool>,
}

impl LocateSeed<'_> {
    fn stop<E: Error, T>(self) -> Result<T, E> {
        self.found.set(self.path.is_empty());
        Err(E::custom("found"))
    }
}

impl<'de> DeserializeSeed<'de> for LocateSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for LocateSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.stop()
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.stop()
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.stop()
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.stop()
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        self.stop()
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.stop()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let Some((Segment::Index(wanted), rest)) = self.path.split_first() else {
            return self.stop();
        };
        for _ in 0..*wanted {
            if access.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        access.next_element_seed(LocateSeed { path: rest, found: self.found })?;
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let Some((Segment::Key(wanted), rest)) = self.path.split_first() else {
            return self.stop();
        };
        let last = rest.is_empty().then_some((wanted.as_str(), self.found));
        while let Some(key) = access.next_key_seed(KeySeed { wanted: last })? {
            if key == *wanted {
                return access.next_value_seed(LocateSeed { path: rest, found: self.found });
            }
            access.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Segment {
        Segment::Key(text.into())
    }

    #[test]
    fn a_broken_document_does_not_hide_its_neighbours() {
        let text = "# head\n---\na: 1\n---\nb: [1\n---\nc: 3\n...\n---\n";
        let read = documents(text, Format::Yaml);
        assert_eq!(read.len(), 3, "{read:?}");
        assert_eq!(read[0].as_ref().unwrap().value["a"], 1);
        assert!((4..=6).contains(&read[1].as_ref().unwrap_err().line), "{:?}", read[1]);
        assert_eq!(read[2].as_ref().unwrap().value["c"], 3);
    }

    #[test]
    fn lines_are_found_by_path() {
        let text = "x: 0\n---\nkind: A\nspec:\n  rules:\n  - from: 1\n  - from:\n      a: b\n  ports:\n    8080:\n      mode: X\n";
        let read = documents(text, Format::Yaml);
        let document = read[1].as_ref().unwrap();
        let line = |path: &[Segment]| line_of(document, path);
        assert_eq!(line(&[key("kind")]), 3);
        assert_eq!(line(&[key("spec"), key("rules"), Segment::Index(1), key("from"), key("a")]), 8);
        assert_eq!(line(&[key("spec"), key("ports"), key("8080"), key("mode")]), 11);
        assert_eq!(line(&[key("spec"), key("absent")]), 4, "the parent's line stands in");
        let json = documents("{\"a\":\n 1}\n{\n\"b\":\n[1,\n2]}", Format::Json);
        assert_eq!(line_of(json[1].as_ref().unwrap(), &[key("b"), Segment::Index(1)]), 6);
    }

    /// Hours of the parser's time without the bound, and seconds at it.
    #[test]
    fn brackets_are_bounded() {
        let with = |brackets: usize| format!("kind: {}\n", "[".repeat(brackets));
        let (most, more) = (with(MAX_BRACKETS), with(MAX_BRACKETS + 1));
        let problem = |text| documents(text, Format::Yaml)[0].as_ref().unwrap_err().problem.clone();
        assert!(!problem(&most).contains("write it in block style"));
        assert!(problem(&more).contains("write it in block style"));
        assert!(problem(&with(1_000_000)).contains("write it in block style"));
    }

    #[test]
    fn bombs_and_oddities_are_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let inner = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
        }
        let deep = format!("a: {}{}", "[".repeat(5_000), "]".repeat(5_000));
        for text in [
            bomb.as_str(),
            deep.as_str(),
            "a: 1\na: 2\n",
            "a: &x {b: 1}\nc:\n  <<: *x\n",
            "a: !tag 1",
            "? [a]\n: 1",
        ] {
            let read = documents(text, Format::Yaml);
            assert!(read[0].is_err(), "{:.60}", text);
        }
        assert!(documents("{\"a\":1,\"a\":2}", Format::Json)[0].is_err());
        assert!(documents(&"[".repeat(100_000), Format::Json)[0].is_err());
        assert!(documents("\u{feff}a: 1", Format::Yaml)[0].is_ok());
    }
}
