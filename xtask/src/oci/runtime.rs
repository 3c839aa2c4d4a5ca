//! What a dynamically linked program needs beside itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::command::{command, output_of};

/// The loader and the libraries of `program`, at the paths where the loader looks for them: image path → file here.
pub(crate) fn libraries(program: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let listed = output_of(&mut command("ldd", &[&program.to_string_lossy()]))
        .with_context(|| format!("cannot tell what {} is linked with", program.display()))?;
    let mut files = BTreeMap::new();
    for line in listed.lines() {
        // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)`; the kernel's own has no path.
        let words: Vec<&str> = line.split_whitespace().collect();
        let path = match words.as_slice() {
            [_, "=>", "not", "found"] => bail!("{} lacks {line}", program.display()),
            [_, "=>", path, _] => path,
            [path, _] if path.starts_with('/') => path,
            _ => continue,
        };
        files.insert((*path).to_owned(), PathBuf::from(path));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_needs_a_loader_and_a_c_library() {
        let files = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(files.keys().any(|path| path.contains("libc.so")), "{files:?}");
        assert!(files.keys().any(|path| path.contains("/ld-linux")), "{files:?}");
    }
}
