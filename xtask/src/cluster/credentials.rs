//! Who is who in the cluster: one authority, two certificates, one key for service accounts and a
//! static token for everybody else. The API server's own bootstrap roles cover all of them.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::addresses::{API_SERVER, Plan};
use crate::command::{command, quietly};

/// The folder with keys, certificates, tokens and kubeconfigs.
#[derive(Debug)]
pub(super) struct Credentials {
    folder: PathBuf,
}

/// A user, in the sense of the API server's token file.
struct User<'a> {
    /// Name of the kubeconfig.
    file: &'a str,
    name: &'a str,
    group: Option<&'a str>,
}

const USERS: &[User<'_>] = &[
    User { file: "admin", name: "admin", group: Some("system:masters") },
    User { file: "controller-manager", name: "system:kube-controller-manager", group: None },
    User { file: "scheduler", name: "system:kube-scheduler", group: None },
    User { file: "proxy", name: "system:kube-proxy", group: None },
];

impl Credentials {
    pub(super) const fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// A file of the folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The kubeconfig of a user; nodes are called `node1`, `node2` and so on.
    pub(super) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.path(&format!("{user}.kubeconfig"))
    }

    /// Makes everything anew.
    pub(super) fn create(&self, nodes: u8) -> anyhow::Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        self.authority().context("cannot make the cluster's authority")?;
        let names = Plan::api_server_names().join(",");
        self.certificate("apiserver", "/CN=kube-apiserver", "serverAuth", Some(&names))?;
        // The API server knows no other way to show a kubelet who it is.
        let subject = "/O=system:masters/CN=kube-apiserver-kubelet-client";
        self.certificate("kubelet-client", subject, "clientAuth", None)?;
        self.key("service-accounts")?;
        let mut tokens = String::new();
        for user in USERS {
            tokens.push_str(&self.user(user)?);
        }
        for node in 1..=nodes {
            let file = format!("node{node}");
            let name = format!("system:node:node{node}");
            let user = User { file: &file, name: &name, group: Some("system:nodes") };
            tokens.push_str(&self.user(&user)?);
        }
        write_private(&self.path("tokens.csv"), &tokens)
    }

    fn key(&self, name: &str) -> anyhow::Result<()> {
        let arguments = ["ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out"];
        quietly(command("openssl", &arguments).arg(self.path(&format!("{name}.key"))))
    }

    fn authority(&self) -> anyhow::Result<()> {
        self.key("ca")?;
        let usage = "keyUsage=critical,keyCertSign,digitalSignature";
        let mut openssl = command("openssl", &["req", "-x509", "-new", "-subj", "/CN=cluster-ca"]);
        openssl.args(["-days", "3650", "-addext", usage]);
        openssl.arg("-key").arg(self.path("ca.key")).arg("-out").arg(self.path("ca.crt"));
        quietly(&mut openssl)
    }

    fn certificate(
        &self,
        name: &str,
        subject: &str,
        usage: &str,
        names: Option<&str>,
    ) -> anyhow::Result<()> {
        self.key(name)?;
        let [key, request, certificate, extensions] =
            ["key", "csr", "crt", "ext"].map(|ending| self.path(&format!("{name}.{ending}")));
        let mut text = format!("extendedKeyUsage={usage}\nkeyUsage=critical,digitalSignature\n");
        if let Some(names) = names {
            text.push_str(&format!("subjectAltName={names}\n"));
        }
        fs::write(&extensions, text)?;
        let mut ask = command("openssl", &["req", "-new", "-subj", subject]);
        quietly(ask.arg("-key").arg(key).arg("-out").arg(&request))?;
        let serial = format!("0x{}", random_hex(8)?);
        let mut sign = command("openssl", &["x509", "-req", "-days", "3650"]);
        sign.args(["-set_serial", &serial]).arg("-in").arg(&request);
        sign.arg("-CA").arg(self.path("ca.crt")).arg("-CAkey").arg(self.path("ca.key"));
        sign.arg("-extfile").arg(extensions).arg("-out").arg(certificate);
        quietly(&mut sign)
    }

    /// Writes a user's kubeconfig and gives its line of the token file.
    fn user(&self, user: &User<'_>) -> anyhow::Result<String> {
        let token = random_hex(16)?;
        let kubeconfig = kubeconfig(&token, &self.path("ca.crt"));
        write_private(&self.kubeconfig(user.file), &kubeconfig)?;
        let name = user.name;
        Ok(match user.group {
            Some(group) => format!("{token},{name},{name},\"{group}\"\n"),
            None => format!("{token},{name},{name}\n"),
        })
    }
}

fn kubeconfig(token: &str, authority: &Path) -> String {
    let authority = authority.display();
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: cluster
  cluster: {{server: \"https://{API_SERVER}:6443\", certificate-authority: \"{authority}\"}}
users:
- name: user
  user: {{token: \"{token}\"}}
contexts:
- name: cluster
  context: {{cluster: cluster, user: user}}
current-context: cluster
"
    )
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

fn random_hex(bytes: usize) -> anyhow::Result<String> {
    let mut random = vec![0; bytes];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
