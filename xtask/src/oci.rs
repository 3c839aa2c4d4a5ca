//! OCI images as plain tar archives, written without a container engine.
//!
//! Format: OCI image layout 1.0.0, with the annotation by which `ctr images import` names an image.
//! Layers are uncompressed, so a layer's digest is its `diff_id`; nothing in an archive depends on
//! time or machine, so that equal input gives equal bytes.

pub(crate) mod runtime;
mod tar;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use tar::{Kind, Tar};

/// One image to be.
#[derive(Debug, Default)]
pub(crate) struct Image {
    /// `registry/repository:tag`, as a pod names it.
    pub(crate) name: String,
    /// The program and its leading arguments.
    pub(crate) entrypoint: Vec<String>,
    /// `uid:gid` of the program, root when empty.
    pub(crate) user: String,
    /// Path in the image → file on this machine; all are executable and belong to root.
    pub(crate) files: BTreeMap<String, PathBuf>,
    /// Path in the image → text of the file.
    pub(crate) texts: BTreeMap<String, String>,
    /// Path in the image → target of the symbolic link.
    pub(crate) links: BTreeMap<String, String>,
    /// Empty folders; the folders above files and links are there anyway.
    pub(crate) folders: BTreeSet<String>,
    /// `org.opencontainers.image.*` and other labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// Writes one archive that holds `images`; layers that are equal are stored once.
pub(crate) fn write(path: &Path, images: &[Image]) -> anyhow::Result<()> {
    let mut archive = Archive { tar: Tar::default(), known: BTreeSet::new() };
    archive.tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut manifests = Vec::new();
    for image in images {
        let manifest =
            archive.image(image).with_context(|| format!("cannot make image {}", image.name))?;
        manifests.push(manifest);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    archive.tar.file("index.json", 0o644, index.to_string().as_bytes())?;
    fs::write(path, archive.tar.finish())
        .with_context(|| format!("cannot write {}", path.display()))
}

struct Archive {
    tar: Tar,
    known: BTreeSet<String>,
}

impl Archive {
    /// Adds an image's blobs and gives its descriptor for the index.
    fn image(&mut self, image: &Image) -> anyhow::Result<Value> {
        let layer = self.blob(&layer(image)?, "application/vnd.oci.image.layer.v1.tar")?;
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": image.entrypoint,
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"],
                "User": image.user,
                "WorkingDir": "/",
                "Labels": image.labels,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "history": [{"created_by": "cargo xtask image"}],
        });
        let config =
            self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json")?;
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media,
            "config": config,
            "layers": [layer],
            "annotations": image.labels,
        });
        let mut descriptor = self.blob(manifest.to_string().as_bytes(), media)?;
        descriptor["annotations"] = json!({
            "io.containerd.image.name": image.name,
            "org.opencontainers.image.ref.name": tag(&image.name),
        });
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture()});
        Ok(descriptor)
    }

    fn blob(&mut self, bytes: &[u8], media: &str) -> anyhow::Result<Value> {
        let digest = sha256(bytes);
        if self.known.insert(digest.clone()) {
            self.tar.file(&format!("blobs/sha256/{digest}"), 0o644, bytes)?;
        }
        Ok(json!({
            "mediaType": media,
            "digest": format!("sha256:{digest}"),
            "size": bytes.len(),
        }))
    }
}

/// Lower-case hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The only layer: folders first, each above what it holds.
fn layer(image: &Image) -> anyhow::Result<Vec<u8>> {
    let mut folders = image.folders.clone();
    for path in image.files.keys().chain(image.texts.keys()).chain(image.links.keys()) {
        folders.insert(parent(path).to_owned());
    }
    for folder in folders.clone() {
        let mut above = parent(&folder);
        while !above.is_empty() {
            folders.insert(above.to_owned());
            above = parent(above);
        }
    }
    let mut tar = Tar::default();
    for folder in folders.iter().filter(|folder| !folder.trim_matches('/').is_empty()) {
        let mode = if folder == "/tmp" { 0o1777 } else { 0o755 };
        tar.entry(relative(folder), mode, &Kind::Folder)?;
    }
    for (path, source) in &image.files {
        let bytes =
            fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        tar.file(relative(path), 0o755, &bytes)?;
    }
    for (path, text) in &image.texts {
        tar.file(relative(path), 0o644, text.as_bytes())?;
    }
    for (path, target) in &image.links {
        tar.entry(relative(path), 0o777, &Kind::Link(target))?;
    }
    Ok(tar.finish())
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(above, _)| above)
}

fn relative(path: &str) -> &str {
    path.trim_matches('/')
}

fn tag(name: &str) -> &str {
    name.rsplit_once(':').map_or("latest", |(_, tag)| tag)
}

/// As OCI spells it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(name: &str) -> Image {
        Image {
            name: name.to_owned(),
            entrypoint: vec!["/bin/sh".to_owned()],
            texts: BTreeMap::from([("/etc/motd".to_owned(), "hello\n".to_owned())]),
            links: BTreeMap::from([("/bin/sh".to_owned(), "busybox".to_owned())]),
            folders: BTreeSet::from(["/tmp".to_owned()]),
            ..Image::default()
        }
    }

    #[test]
    fn equal_images_give_equal_archives_and_share_their_layer() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["one.tar", "two.tar"].map(|name| folder.path().join(name));
        write(&one, &[shell("a.test/a:1"), shell("a.test/b:1")]).unwrap();
        write(&two, &[shell("a.test/a:1"), shell("a.test/b:1")]).unwrap();
        let bytes = fs::read(&one).unwrap();
        assert_eq!(bytes, fs::read(&two).unwrap());
        let layer = sha256(&layer(&shell("")).unwrap());
        let entry = format!("blobs/sha256/{layer}");
        let found = bytes.windows(entry.len()).filter(|window| *window == entry.as_bytes()).count();
        assert_eq!(found, 1, "the layer is stored once");
    }

    #[test]
    fn a_digest_is_that_of_sha256sum() {
        assert_eq!(
            sha256(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut image = shell("a.test/a:1");
        image.files.insert("/bin/x".to_owned(), folder.path().join("absent"));
        let fault = write(&folder.path().join("out.tar"), &[image]).unwrap_err();
        assert!(format!("{fault:#}").contains("absent"), "{fault:#}");
    }
}
