//! The images every node starts with: there is no registry, and nothing is ever pulled.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::layout::Layout;
use super::tools::{GRPC, Tools};
use crate::command::{command, output_of};
use crate::oci::{self, Image, runtime};

/// What containerd starts each pod with.
pub(super) const PAUSE_IMAGE: &str = "registry.k8s.io/pause:3.10";
/// As `tests/cluster/coredns.yaml` names it.
const COREDNS_IMAGE: &str = "registry.k8s.io/coredns/coredns:v1.14.3";
/// A shell and the usual tools: what tests run in pods.
const SHELL_IMAGE: &str = "culvert.test/shell:1";
/// A real server and a real client of HTTP.
const NGINX_IMAGE: &str = "culvert.test/nginx:1";
const CURL_IMAGE: &str = "culvert.test/curl:1";
/// Real servers with their clients.
const REDIS_IMAGE: &str = "culvert.test/redis:1";
const POSTGRES_IMAGE: &str = "culvert.test/postgres:1";
const GRPC_IMAGE: &str = "culvert.test/grpc:1";

/// Writes the archive that nodes import while the API server starts.
pub(super) fn write(layout: &Layout, tools: &Tools) -> anyhow::Result<()> {
    let program = |name: &str, path: &str, source: PathBuf| Image {
        name: name.to_owned(),
        entrypoint: vec![path.to_owned()],
        files: BTreeMap::from([(path.to_owned(), source)]),
        ..Image::default()
    };
    let images = [
        program(PAUSE_IMAGE, "/pause", tools.pause()),
        program(COREDNS_IMAGE, "/coredns", tools.coredns()),
        shell()?,
        real(NGINX_IMAGE, "/usr/sbin/nginx", &["-c", "/etc/nginx/nginx.conf"], NGINX)?,
        real(CURL_IMAGE, "/usr/bin/curl", &[], CURL)?,
    ];
    oci::write(&layout.images(), &images)
}

/// Writes an archive with programs that tests of the mesh use; the nodes do not start with them.
pub(super) fn write_programs(archive: &Path) -> anyhow::Result<()> {
    let mut redis = real(REDIS_IMAGE, "/usr/bin/redis-server", &[], CURL)?;
    add(&mut redis, Path::new("/usr/bin/redis-cli"))?;
    let mut grpc = shell()?;
    GRPC_IMAGE.clone_into(&mut grpc.name);
    grpc.entrypoint = vec!["/usr/bin/grpc".to_owned()];
    grpc.files.insert("/usr/bin/grpc".to_owned(), GRPC.build()?.join("grpc"));
    oci::write(archive, &[redis, postgres()?, grpc])
}

/// Debian's newest PostgreSQL; it refuses to run as root.
fn postgres() -> anyhow::Result<Image> {
    let folder = PathBuf::from("/usr/lib/postgresql");
    let versions = fs::read_dir(&folder).context("no PostgreSQL: cargo xtask setup")?;
    let newest = versions.flatten().map(|entry| entry.file_name()).max();
    let version = newest.context("no PostgreSQL: cargo xtask setup")?;
    let programs = folder.join(&version).join("bin");
    let mut image = shell()?;
    POSTGRES_IMAGE.clone_into(&mut image.name);
    for name in ["postgres", "initdb", "psql", "pgbench", "pg_isready"] {
        add(&mut image, &programs.join(name))?;
        let link = (format!("/usr/bin/{name}"), programs.join(name).display().to_string());
        image.links.insert(link.0, link.1);
    }
    let shared = Path::new("/usr/share/postgresql").join(&version);
    for below in [folder.join(&version).join("lib"), shared] {
        // The compiler of queries is as large as everything else, and needs its own libraries.
        add_folder(&mut image, &below, &|path| !path.to_string_lossy().contains("llvm"))?;
    }
    image.user = "1000:1000".to_owned();
    let user = ("/etc/passwd".to_owned(), "postgres:x:1000:1000::/data:/bin/sh\n".to_owned());
    image.texts.extend([user]);
    Ok(image)
}

/// Adds a program of this machine with its libraries, at its own path.
fn add(image: &mut Image, program: &Path) -> anyhow::Result<()> {
    image.files.extend(runtime::libraries(program)?);
    image.files.insert(program.display().to_string(), program.to_owned());
    Ok(())
}

fn add_folder(
    image: &mut Image,
    folder: &Path,
    wanted: &dyn Fn(&Path) -> bool,
) -> anyhow::Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if !wanted(&path) {
            continue;
        }
        if path.is_dir() {
            add_folder(image, &path, wanted)?;
        } else {
            image.files.insert(path.display().to_string(), path);
        }
    }
    Ok(())
}

/// A text file of an image: path and content.
type Text = (&'static str, &'static str);

/// Serves one line with the pod's name and the client's address.
const NGINX: &[Text] = &[
    ("/etc/passwd", "root:x:0:0::/:/bin/sh\n"),
    ("/etc/group", "root:x:0:\n"),
    (
        "/etc/nginx/nginx.conf",
        "user root; worker_processes 1; daemon off; pid /tmp/pid; error_log stderr;
events {}
http {
    access_log /dev/stdout;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
    server { listen 8080; listen [::]:8080; return 200 \"hello from $hostname to $remote_addr\\n\"; }
}
",
    ),
];
const CURL: &[Text] = &[("/etc/passwd", "root:x:0:0::/:/bin/sh\n")];

/// A program of this machine with its libraries, and busybox to wait and look around with.
fn real(name: &str, program: &str, arguments: &[&str], texts: &[Text]) -> anyhow::Result<Image> {
    let source = PathBuf::from(program);
    if !source.exists() {
        bail!("no {program}: cargo xtask setup");
    }
    let mut image = shell()?;
    name.clone_into(&mut image.name);
    image.entrypoint =
        [program].into_iter().chain(arguments.iter().copied()).map(str::to_owned).collect();
    image.files.extend(runtime::libraries(&source)?);
    image.files.insert(program.to_owned(), source);
    image.texts = texts.iter().map(|(path, text)| ((*path).into(), (*text).into())).collect();
    for folder in ["/var/log/nginx", "/var/lib/nginx"] {
        image.folders.insert(folder.to_owned());
    }
    Ok(image)
}

/// Debian's static busybox, a link per tool.
fn shell() -> anyhow::Result<Image> {
    let known = ["/bin/busybox", "/usr/bin/busybox"];
    let Some(busybox) = known.iter().map(Path::new).find(|path| path.exists()) else {
        bail!("no busybox: install the package busybox-static");
    };
    let tools = output_of(&mut command(&busybox.to_string_lossy(), &["--list"]))
        .context("cannot list the tools of busybox")?;
    let links = tools
        .lines()
        .filter(|tool| *tool != "busybox")
        .map(|tool| (format!("/bin/{tool}"), "busybox".to_owned()))
        .collect();
    Ok(Image {
        name: SHELL_IMAGE.to_owned(),
        entrypoint: vec!["/bin/sh".to_owned()],
        files: BTreeMap::from([("/bin/busybox".to_owned(), busybox.to_owned())]),
        links,
        folders: BTreeSet::from(["/tmp".to_owned(), "/etc".to_owned()]),
        ..Image::default()
    })
}
