use std::os::unix::fs::symlink;

use tokio::sync::mpsc::{Receiver, channel};

use super::super::{Change, SourceEvent};
use super::*;

const NS: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: NAME}\n";

/// A root with manifests, a state directory, and what a source says about them.
struct Watched {
    directory: tempfile::TempDir,
    tree: Tree,
    events: (Sender<SourceEvent>, Receiver<SourceEvent>),
    first: bool,
}

impl Watched {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("m")).unwrap();
        let tree = Self::tree(directory.path());
        Self { directory, tree, events: channel(64), first: true }
    }

    fn tree(directory: &Path) -> Tree {
        let state = StateDir::open(&directory.join("state")).unwrap();
        let records = Records::open(&state).unwrap();
        Tree::new(directory.join("m"), state, records)
    }

    fn restart(&mut self) {
        self.tree = Self::tree(self.directory.path());
        self.first = true;
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("m").join(name)
    }

    fn write(&self, name: &str) {
        fs::write(self.path(name), NS.replace("NAME", name.trim_end_matches(".yaml"))).unwrap();
    }

    /// Looks; the changes, and whether the root is missing.
    fn look(&mut self) -> (Vec<String>, bool) {
        assert!(self.tree.look(&self.events.0, std::mem::take(&mut self.first)));
        let mut changes = Vec::new();
        while let Ok(event) = self.events.1.try_recv() {
            let SourceEvent::Changes(more) = event else { continue };
            changes.extend(more.iter().map(|change| match change {
                Change::Upsert(object) => format!("+{}", object.meta().name),
                Change::Delete(key) => format!("-{}", key.name),
            }));
        }
        let missing = self.tree.last_status.as_ref().is_some_and(|last| last.missing.is_some());
        (changes, missing)
    }

    fn changes(&mut self) -> Vec<String> {
        self.look().0
    }
}

#[test]
fn deleting_files_deletes_and_emptying_the_root_does_not() {
    let mut watched = Watched::new();
    ["a.yaml", "b.yaml", "c.yaml"].iter().for_each(|name| watched.write(name));
    assert_eq!(watched.changes(), ["+a", "+b", "+c"]);
    fs::remove_file(watched.path("a.yaml")).unwrap();
    assert_eq!(watched.look(), (vec!["-a".to_owned()], false), "a single file");
    fs::remove_file(watched.path("b.yaml")).unwrap();
    fs::remove_file(watched.path("c.yaml")).unwrap();
    assert_eq!(watched.look(), (vec![], true), "everything");
    // A restart changes nothing about that, nor does it when the folder goes as well.
    watched.restart();
    assert_eq!(watched.look(), (vec!["+b".to_owned(), "+c".to_owned()], true));
    fs::remove_dir(watched.path("")).unwrap();
    assert_eq!(watched.look(), (vec![], true));
    watched.restart();
    assert_eq!(watched.look(), (vec!["+b".to_owned(), "+c".to_owned()], true));
    // Files come back one by one; those that are late are waited for.
    fs::create_dir(watched.path("")).unwrap();
    watched.write("b.yaml");
    assert_eq!(watched.look(), (vec![], true));
    watched.tree.returned = Instant::now().checked_sub(RETURN_GRACE * 2);
    assert_eq!(watched.look(), (vec!["-c".to_owned()], false), "it does not come back");
}

#[test]
fn an_operator_confirms_that_nothing_is_meant_to_be_there() {
    let mut watched = Watched::new();
    watched.write("a.yaml");
    assert_eq!(watched.changes(), ["+a"]);
    // Given while nothing is missing it is taken back, so that it cannot wait for an accident.
    accept_empty(&watched.tree.state.clone()).unwrap();
    assert_eq!(watched.look(), (vec![], false));
    fs::remove_file(watched.path("a.yaml")).unwrap();
    assert_eq!(watched.look(), (vec![], true));
    accept_empty(&watched.tree.state.clone()).unwrap();
    assert_eq!(watched.look(), (vec!["-a".to_owned()], false));
    watched.restart();
    assert_eq!(watched.look(), (vec![], false), "and it is forgotten");
}

#[test]
fn a_folder_that_cannot_be_looked_into_keeps_its_objects() {
    let mut watched = Watched::new();
    fs::create_dir(watched.path("sub")).unwrap();
    watched.write("a.yaml");
    watched.write("sub/b.yaml");
    fs::write(watched.path("sub/b.yaml"), NS.replace("NAME", "b")).unwrap();
    assert_eq!(watched.changes(), ["+a", "+b"]);
    // What an unmounted volume looks like: the folder is empty and on another device.
    fs::remove_file(watched.path("sub/b.yaml")).unwrap();
    let sub = watched.path("sub");
    *watched.tree.devices.get_mut(&sub).unwrap() += 1;
    assert_eq!(watched.look(), (vec![], false));
    assert_eq!(watched.look(), (vec![], false), "and again");
    let status = watched.tree.last_status.clone().unwrap();
    assert_eq!((status.kept, status.refused.len()), (1, 1));
    fs::remove_dir(watched.path("sub")).unwrap();
    assert_eq!(watched.changes(), ["-b"], "the folder itself is gone");
}

/// What is still named is kept and told, whatever became of it; what is named no more is deleted.
#[test]
fn what_is_still_named_is_not_deleted() {
    let mut watched = Watched::new();
    let away = watched.directory.path().join("away");
    fs::create_dir_all(away.join("folder")).unwrap();
    fs::create_dir(watched.path("sub")).unwrap();
    for (file, name) in [
        (away.join("folder/b.yaml"), "b"),
        (away.join("c.yaml"), "c"),
        (watched.path("d.yaml"), "d"),
        (watched.path("e.yaml"), "e"),
        (watched.path("sub/f.yaml"), "f"),
    ] {
        fs::write(file, NS.replace("NAME", name)).unwrap();
    }
    symlink(away.join("folder"), watched.path("link")).unwrap();
    symlink(away.join("c.yaml"), watched.path("c.yaml")).unwrap();
    watched.write("a.yaml");
    let all = ["+a", "+b", "+c", "+d", "+e", "+f"].map(str::to_owned).to_vec();
    assert_eq!(watched.changes(), all);

    fs::rename(&away, watched.directory.path().join("elsewhere")).unwrap();
    fs::remove_file(watched.path("d.yaml")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(watched.path("d.yaml")).unwrap();
    fs::remove_file(watched.path("e.yaml")).unwrap();
    fs::create_dir(watched.path("e.yaml")).unwrap();
    fs::remove_dir_all(watched.path("sub")).unwrap();
    fs::write(watched.path("sub"), "").unwrap();
    // Neither is ours, nor ever was.
    fs::write(watched.path("README"), "").unwrap();
    fs::create_dir(watched.path("other.yaml")).unwrap();
    let told = |watched: &Watched| {
        let status = watched.tree.last_status.clone().unwrap();
        (status.kept, status.refused.len())
    };
    assert_eq!(watched.look(), (vec![], false));
    assert_eq!(told(&watched), (5, 5));
    assert_eq!(watched.look(), (vec![], false), "and again");
    watched.restart();
    let (mut again, missing) = watched.look();
    again.sort();
    assert_eq!((again, missing), (all, false));
    assert_eq!(told(&watched), (5, 5), "after a restart");

    fs::rename(watched.directory.path().join("elsewhere"), &away).unwrap();
    assert_eq!(watched.look(), (vec![], false));
    assert_eq!(told(&watched), (3, 3), "the links lead somewhere again");
    for name in ["link", "c.yaml", "d.yaml", "sub"] {
        fs::remove_file(watched.path(name)).unwrap();
    }
    fs::remove_dir(watched.path("e.yaml")).unwrap();
    assert_eq!(watched.changes(), ["-b", "-c", "-d", "-e", "-f"]);
    assert_eq!(told(&watched), (0, 0));
}

/// A mounted ConfigMap: the swap of its link changes what it holds, with nothing deleted in between.
#[test]
fn a_mounted_config_map_is_swapped() {
    let mut watched = Watched::new();
    let version = |watched: &Watched, name: &str, text: &str| {
        fs::create_dir(watched.path(name)).unwrap();
        fs::write(watched.path(name).join("a.yaml"), text).unwrap();
        symlink(name, watched.path("..new")).unwrap();
        fs::rename(watched.path("..new"), watched.path("..data")).unwrap();
    };
    version(&watched, "..1", &NS.replace("NAME", "a"));
    symlink("..data/a.yaml", watched.path("a.yaml")).unwrap();
    assert_eq!(watched.changes(), ["+a"]);
    let labelled = NS.replace("{name: NAME}", "{name: a, labels: {x: y}}");
    version(&watched, "..2", &labelled);
    fs::remove_dir_all(watched.path("..1")).unwrap();
    assert_eq!(watched.look(), (vec!["+a".to_owned()], false));
}
