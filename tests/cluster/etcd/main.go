// Command etcd is the storage of the control plane: etcd's own main function, built from the version that kube-apiserver names.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
