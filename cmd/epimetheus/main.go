// Command epimetheus is all of Epimetheus: a role per subcommand.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/promslog"
	promslogflag "github.com/prometheus/common/promslog/flag"
	"github.com/prometheus/common/version"
)

func main() {
	os.Exit(execute(os.Args[1:]))
}

// command is a subcommand that has been parsed.
type command func(*global) error

// global are the flags of every subcommand.
type global struct {
	configFile string
	log        promslog.Config
}

// execute is main with an exit code: 0 fine, 1 failed, 2 wrong use.
func execute(args []string) int {
	app, g, commands := newApp()
	name, err := app.Parse(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "epimetheus: %v (see epimetheus --help)\n", err)
		return 2
	}
	if err := commands[name](g); err != nil {
		if !errors.Is(err, errSaid) {
			fmt.Fprintf(os.Stderr, "epimetheus: %v\n", err)
		}
		return 1
	}
	return 0
}

// newApp makes the command line.
func newApp() (*kingpin.Application, *global, map[string]command) {
	app := kingpin.New("epimetheus", "A memory without an end for Prometheus.")
	app.HelpFlag.Short('h')
	app.Version(version.Print("epimetheus")).VersionFlag.Short('v')
	g := &global{}
	app.Flag("config.file", "YAML configuration file; without it defaults hold.").StringVar(&g.configFile)
	promslogflag.AddFlags(app, &g.log)

	commands := map[string]command{}
	for _, add := range []func(*kingpin.Application, map[string]command){addAll, addSidecar, addIngester, addGateway, addCompactor, addTool} {
		add(app, commands)
	}
	return app, g, commands
}

// errSaid is an error of which the user has been told all.
var errSaid = errors.New("said")
