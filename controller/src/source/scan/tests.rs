use super::*;

fn text(text: &str) -> FileContent {
    FileContent::Text(text.to_owned())
}

fn files<const N: usize>(files: [(&str, FileContent); N]) -> BTreeMap<PathBuf, FileContent> {
    files.into_iter().map(|(path, content)| (path.into(), content)).collect()
}

/// Records in memory.
#[derive(Debug, Default)]
struct Memory(BTreeMap<PathBuf, Vec<String>>);

impl LastGood for Memory {
    fn read(&mut self, file: &Path) -> Vec<String> {
        self.0.get(file).cloned().unwrap_or_default()
    }

    fn write(&mut self, file: &Path, objects: &[&str]) {
        self.0.insert(file.into(), objects.iter().map(|text| (*text).to_owned()).collect());
    }
}

fn names(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|change| match change {
            Change::Upsert(object) => {
                if let Object::Unreadable(policy) = &**object {
                    format!("!{} {:?}", policy.key(), policy.reach)
                } else {
                    format!("+{}", object.key())
                }
            }
            Change::Delete(key) => format!("-{key}"),
        })
        .collect()
}

const NS: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";

#[test]
fn the_last_good_version_stays_while_a_file_is_broken() {
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    let first = scan.update(files([("a.yaml", text(NS))]), &mut kept);
    assert_eq!(names(&first), ["+Namespace a"]);
    for broken in [
        "apiVersion: [",
        "kind: Namespace\nmetadata: {name: a}",
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: [x]}",
    ] {
        assert_eq!(
            names(&scan.update(files([("a.yaml", text(broken))]), &mut kept)),
            [""; 0],
            "{broken}"
        );
        assert_eq!(scan.status().refused.len(), 1, "{broken}");
    }
    let unreadable = FileContent::Unreadable("EACCES".into());
    assert!(scan.update(files([("a.yaml", unreadable)]), &mut kept).is_empty());
    assert!(
        scan.update(files([("a.yaml", text(NS))]), &mut kept).is_empty(),
        "the same object is no change"
    );
    assert!(scan.status().refused.is_empty());
    assert_eq!(names(&scan.update(files([]), &mut kept)), ["-Namespace a"]);
}

#[test]
fn duplicates_are_refused_and_name_both_files() {
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    scan.update(files([("b.yaml", text(NS))]), &mut kept);
    let other = format!("# later\n{}", NS.replace("{name: a}", "{name: a, labels: {x: y}}"));
    let both = scan
        .update(files([("a.yaml", text(&other)), ("b.yaml", FileContent::Unchanged)]), &mut kept);
    assert!(both.is_empty(), "the owner stays");
    let refusal = &scan.status().refused[0];
    assert_eq!((refusal.file.as_str(), refusal.line), ("a.yaml", 2));
    assert!(refusal.problem.contains("b.yaml:1"), "{refusal:?}");
    let moved = scan.update(files([("a.yaml", FileContent::Unchanged)]), &mut kept);
    assert_eq!(names(&moved), ["+Namespace a"], "the other definition takes over");
}

#[test]
fn a_moved_object_is_no_change() {
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    scan.update(files([("a.yaml", text(NS))]), &mut kept);
    assert!(scan.update(files([("z/b.yml", text(NS))]), &mut kept).is_empty());
}

#[test]
fn a_refusal_names_line_field_and_remedy() {
    let policy =
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec:\n";
    let cases = [
        (format!("{policy}  action: DENY\n"), 4, "spec.rules"),
        (format!("{policy}  rules:\n  - from:\n    - source:\n        fooBars: [x]\n"), 8, "spec.rules[0].from[0].source.fooBars"),
        (format!("{policy}  rules:\n  - to:\n    - operation:\n        ports: [http]\n"), 7, "spec.rules[0].to[0].operation"),
        (format!("{policy}  action: MAYBE\n"), 5, "spec.action"),
        ("kind: Pod".to_owned(), 1, ""),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: Bad_Name\n".to_owned(), 4, "metadata.name"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec:\n  ports:\n  - port: 70000\n".to_owned(), 6, "spec.ports[0].port"),
    ];
    for (manifest, line, field) in cases {
        let (mut scan, mut kept) = (Scan::default(), Memory::default());
        scan.update(files([("a.yaml", text(&manifest))]), &mut kept);
        let refusal = &scan.status().refused[0];
        assert_eq!((refusal.line, refusal.field.as_str()), (line, field), "{manifest}{refusal:?}");
        assert!(!refusal.remedy.is_empty());
    }
}

const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec: {selector: {matchLabels: {app: x}}, action: DENY, rules: [{}]}\n";

#[test]
fn the_last_good_version_stays_across_restarts() {
    let mut kept = Memory::default();
    let both = format!("{NS}---\n{POLICY}");
    let broken = both.replace("DENY", "MAYBE").replace("name: a}", "name: a, labels: {x: y}}");
    Scan::default().update(files([("a.yaml", text(&both))]), &mut kept);
    for file in ["a.yaml", "a.yaml: ["].map(|name| name.contains('[')) {
        let manifest = if file { format!("{broken}---\nkind: [") } else { broken.clone() };
        let mut restarted = Scan::default();
        let changes = names(&restarted.update(files([("a.yaml", text(&manifest))]), &mut kept));
        assert_eq!(changes, ["+AuthorizationPolicy a/p", "+Namespace a"]);
        let status = restarted.status();
        assert_eq!(
            (status.kept, status.kept_objects.as_slice()),
            (1, &["AuthorizationPolicy a/p".to_owned()][..])
        );
        assert!(status.refused.iter().any(|refusal| refusal.last_good_in_use && !refusal.denied));
    }
    // What the second run wrote down holds the newer namespace and still the older policy.
    let mut third = Scan::default();
    let unreadable = FileContent::Unreadable("EACCES".into());
    let changes = names(&third.update(files([("a.yaml", unreadable)]), &mut kept));
    assert_eq!(changes, ["+Namespace a", "+AuthorizationPolicy a/p"]);
    assert_eq!(third.status().kept, 2);
    assert!(kept.0[Path::new("a.yaml")].concat().contains("\"x\":\"y\""));
    // A file that is gone is a deletion, and an object that its file does not mean to hold is none of its.
    assert!(Scan::default().update(files([]), &mut kept).is_empty());
    let without = text("apiVersion: v2\nkind: Namespace\nmetadata: {name: b}");
    assert!(Scan::default().update(files([("a.yaml", without)]), &mut kept).is_empty());
    assert!(kept.0[Path::new("a.yaml")].is_empty(), "it does not come back either");
}

#[test]
fn a_refused_policy_without_a_good_version_denies() {
    let selected = "Selected(Selector({\"app\": \"x\"}))";
    for (broken, expected) in [
        (POLICY.replace("DENY", "MAYBE"), format!("!AuthorizationPolicy a/p {selected}")),
        (POLICY.replace("[{}]", "[{frm: []}]"), format!("!AuthorizationPolicy a/p {selected}")),
        (POLICY.replace("selector", "selectr"), "!AuthorizationPolicy a/p Namespace".into()),
        (POLICY.replace("app: x", "app: [x]"), "!AuthorizationPolicy a/p Namespace".into()),
        (
            POLICY.replace("name: p, namespace: a", "name: p, namespace: [a]"),
            "!AuthorizationPolicy p Mesh".into(),
        ),
        (
            POLICY.replace("name: p, namespace: a", "namespace: a"),
            format!("!AuthorizationPolicy a/unnamed_a.yaml:3 {selected}"),
        ),
        (
            POLICY.replace("rules: [{}]}", "rules: [}\n"),
            "!AuthorizationPolicy a/p Namespace".into(),
        ),
        (
            POLICY
                .replace("kind: AuthorizationPolicy", "kind: PeerAuthentication")
                .replace("action", "acton"),
            "!PeerAuthentication a/p Namespace".into(),
        ),
    ] {
        let (mut scan, mut kept) = (Scan::default(), Memory::default());
        let changes = names(&scan.update(files([("a.yaml", text(&broken))]), &mut kept));
        assert_eq!(changes, std::slice::from_ref(&expected), "{broken}");
        assert!(scan.status().refused[0].denied, "{broken}");
        assert!(scan.update(files([("a.yaml", FileContent::Unchanged)]), &mut kept).is_empty());
        // Corrected, it takes the place; broken again, its good version stays; removed, it is gone.
        let good = names(&scan.update(files([("a.yaml", text(POLICY))]), &mut kept));
        assert!(good.contains(&"+AuthorizationPolicy a/p".to_owned()), "{broken}");
        let again = names(&scan.update(files([("a.yaml", text(&broken))]), &mut kept));
        if !broken.contains("PeerAuthentication") {
            assert_eq!(again, [""; 0], "{broken}");
            assert!(scan.status().refused[0].last_good_in_use, "{broken}");
            assert_eq!(names(&scan.update(files([]), &mut kept)), ["-AuthorizationPolicy a/p"]);
        }
    }
    // What was only to be noted refuses nobody.
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    let audit = POLICY.replace("DENY", "AUDIT").replace("[{}]", "[{frm: []}]");
    assert!(scan.update(files([("a.yaml", text(&audit))]), &mut kept).is_empty());
    assert!(scan.status().refused[0].is_not_enforced());
}

#[test]
fn a_denial_ends_with_its_cause() {
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    let broken = POLICY.replace("DENY", "MAYBE");
    scan.update(files([("a.yaml", text(&broken)), ("b.yaml", text(NS))]), &mut kept);
    let gone = scan.update(files([("b.yaml", FileContent::Unchanged)]), &mut kept);
    assert_eq!(names(&gone), ["-AuthorizationPolicy a/p"]);
    assert!(scan.status().refused.is_empty());
}

#[test]
fn what_is_out_of_sight_stays_and_is_counted() {
    let (mut scan, mut kept) = (Scan::default(), Memory::default());
    scan.update(files([("a.yaml", text(NS))]), &mut kept);
    assert!(scan.update(files([("a.yaml", FileContent::OutOfSight)]), &mut kept).is_empty());
    assert_eq!((scan.status().kept, scan.status().refused.len()), (1, 0));
    assert!(scan.update(files([("a.yaml", FileContent::Unchanged)]), &mut kept).is_empty());
    assert_eq!(scan.status().kept, 0, "it is back");
    let mut restarted = Scan::default();
    let restored = restarted.update(files([("a.yaml", FileContent::OutOfSight)]), &mut kept);
    assert_eq!(names(&restored), ["+Namespace a"]);
    assert_eq!(restarted.status().kept, 1);
}
