//! Putting the plugin behind whatever a configuration list holds, and taking it out again.
//!
//! Source: CNI specification 1.1.0, section 1: a list's `plugins` run in order, so the last one sees the finished pod.

use serde_json::{Map, Value};

/// The plugin's program, by which its entry in a list is known.
pub const PLUGIN: &str = "culvert-cni";

/// A file that is no configuration list.
#[derive(Debug, thiserror::Error)]
pub enum InvalidList {
    /// Not JSON.
    #[error("it is not JSON")]
    Json(#[from] serde_json::Error),
    /// A single plugin's configuration, or none.
    #[error(
        "it has no list of plugins; a .conf file with a single plugin has to be made a .conflist"
    )]
    NoPlugins,
}

/// The list with the plugin at its end, set as in `settings`; none when it is so already.
///
/// # Errors
/// When `text` is no list.
pub fn chain(text: &[u8], settings: &Map<String, Value>) -> Result<Option<Vec<u8>>, InvalidList> {
    let mut list: Value = serde_json::from_slice(text)?;
    let mut entry = settings.clone();
    entry.insert("type".to_owned(), PLUGIN.into());
    let entry = Value::Object(entry);
    let plugins = plugins(&mut list)?;
    if plugins.last() == Some(&entry) && plugins.iter().filter(|one| is_ours(one)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|one| !is_ours(one));
    plugins.push(entry);
    written(&list).map(Some)
}

/// The list without the plugin; none when it is not in it.
///
/// # Errors
/// When `text` is no list.
pub fn unchain(text: &[u8]) -> Result<Option<Vec<u8>>, InvalidList> {
    let mut list: Value = serde_json::from_slice(text)?;
    let plugins = plugins(&mut list)?;
    let before = plugins.len();
    plugins.retain(|one| !is_ours(one));
    if plugins.len() == before { Ok(None) } else { written(&list).map(Some) }
}

fn plugins(list: &mut Value) -> Result<&mut Vec<Value>, InvalidList> {
    list.get_mut("plugins").and_then(Value::as_array_mut).ok_or(InvalidList::NoPlugins)
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

fn written(list: &Value) -> Result<Vec<u8>, InvalidList> {
    let mut text = serde_json::to_vec_pretty(list)?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(timeout: u64) -> Map<String, Value> {
        Map::from_iter([("timeoutSeconds".to_owned(), json!(timeout))])
    }

    #[test]
    fn the_plugin_is_last_once_and_leaves_nothing() {
        let original = br#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp","mtu":1}]}"#;
        assert!(unchain(original).unwrap().is_none());
        let chained = chain(original, &settings(30)).unwrap().unwrap();
        let list: Value = serde_json::from_slice(&chained).unwrap();
        assert_eq!(list["plugins"][1], json!({"type": PLUGIN, "timeoutSeconds": 30}));
        assert_eq!(list["plugins"][0], json!({"type": "ptp", "mtu": 1}));
        assert!(chain(&chained, &settings(30)).unwrap().is_none(), "nothing to do");
        let changed = chain(&chained, &settings(60)).unwrap().unwrap();
        let list: Value = serde_json::from_slice(&changed).unwrap();
        assert_eq!(list["plugins"].as_array().unwrap().len(), 2, "its settings are replaced");
        let back: Value = serde_json::from_slice(&unchain(&changed).unwrap().unwrap()).unwrap();
        assert_eq!(back, serde_json::from_slice::<Value>(original).unwrap());
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for wrong in [&b"{"[..], b"[]", b"{}", br#"{"type":"bridge"}"#, br#"{"plugins":{}}"#] {
            assert!(chain(wrong, &settings(1)).is_err());
            assert!(unchain(wrong).is_err());
        }
    }
}
