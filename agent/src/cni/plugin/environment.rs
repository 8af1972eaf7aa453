//! What the runtime tells the plugin by environment variables.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use super::error::Failure;

/// Of one variable. A path and some names.
const MAX_VARIABLE: usize = 16 * 1024;

pub(super) struct Environment {
    pub(super) command: String,
    /// The sandbox.
    pub(super) container: String,
    netns: Option<PathBuf>,
    arguments: String,
}

/// Whose sandbox it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: Option<String>,
}

/// An open network namespace that is not our own.
#[derive(Debug)]
pub(super) struct Netns(File);

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Environment {
    pub(super) fn read(variables: impl Fn(&str) -> Option<OsString>) -> Result<Self, Failure> {
        let text = |name: &'static str| match variables(name) {
            None => Ok(String::new()),
            Some(value) if value.len() > MAX_VARIABLE => {
                Err(Failure::variable(name, "is too long"))
            }
            Some(value) => value
                .into_string()
                .map_err(|_| Failure::variable(name, "is no UTF-8 text")),
        };
        let command = text("CNI_COMMAND")?;
        if command.is_empty() {
            let remedy = "is missing; this is a CNI plugin, a container runtime calls it";
            return Err(Failure::variable("CNI_COMMAND", remedy));
        }
        let netns = text("CNI_NETNS")?;
        Ok(Self {
            command,
            container: text("CNI_CONTAINERID")?,
            netns: (!netns.is_empty()).then(|| netns.into()),
            arguments: text("CNI_ARGS")?,
        })
    }

    pub(super) fn netns_path(&self) -> Option<&Path> {
        self.netns.as_deref()
    }

    pub(super) fn netns(&self) -> Result<Netns, Failure> {
        let Some(path) = &self.netns else {
            return Err(Failure::variable("CNI_NETNS", "is missing"));
        };
        OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map(Netns)
            .map_err(|error| Failure::netns(path, &error))
    }

    /// `None`: no pod of Kubernetes.
    pub(super) fn pod(&self) -> Result<Option<Pod>, Failure> {
        let argument = |name: &str| {
            let pairs = self
                .arguments
                .split(';')
                .filter_map(|pair| pair.split_once('='));
            let mut named = pairs.filter(|(key, _)| *key == name);
            let value = named.next_back().map(|(_, value)| value.to_owned());
            value.filter(|value| !value.is_empty())
        };
        let (namespace, name) = (argument("K8S_POD_NAMESPACE"), argument("K8S_POD_NAME"));
        let (Some(namespace), Some(name)) = (namespace, name) else {
            return Ok(None);
        };
        if self.container.is_empty() {
            return Err(Failure::variable("CNI_CONTAINERID", "is missing"));
        }
        Ok(Some(Pod {
            namespace,
            name,
            uid: argument("K8S_POD_UID"),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Result<Environment, Failure> {
        let find = |name: &str| {
            let pair = pairs.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| OsString::from(value))
        };
        Environment::read(find)
    }

    #[test]
    fn a_pod_is_known_by_its_arguments() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;\
                         K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1";
        let pairs = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_ARGS", arguments),
        ];
        let pod = environment(&pairs).unwrap().pod().unwrap().unwrap();
        assert_eq!((&*pod.namespace, &*pod.name), ("shop", "cart-0"));
        assert_eq!(pod.uid.as_deref(), Some("u-1"));
    }

    #[test]
    fn who_is_no_pod_is_none_whatever_the_arguments() {
        for arguments in [
            "",
            ";;",
            "K8S_POD_NAME=a",
            "K8S_POD_NAMESPACE=;K8S_POD_NAME=a",
            "=",
        ] {
            let pairs = [("CNI_COMMAND", "ADD"), ("CNI_ARGS", arguments)];
            assert_eq!(environment(&pairs).unwrap().pod().unwrap(), None);
        }
    }

    #[test]
    fn a_missing_variable_is_named() {
        let named = |failure: Failure| String::from_utf8(failure.to_json("1.0.0")).unwrap();
        let none = named(environment(&[]).err().unwrap());
        assert!(
            none.contains("CNI_COMMAND") && none.contains("\"code\":4"),
            "{none}"
        );
        let pairs = [("CNI_COMMAND", "ADD")];
        let netns = named(environment(&pairs).unwrap().netns().unwrap_err());
        assert!(netns.contains("CNI_NETNS"), "{netns}");
    }
}
