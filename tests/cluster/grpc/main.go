// Command grpc is a real gRPC server and its client, with the service that kubelet's gRPC probes ask.
//
//	grpc serve :PORT          serves health checks and a stream of them
//	grpc call ADDRESS N       makes N calls, each over a connection of its own
//	grpc hold ADDRESS SECONDS keeps one stream open and calls beside it, over one connection; the first failure ends it
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	api "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "grpc:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) == 2 && arguments[0] == "serve" {
		return serve(arguments[1])
	}
	if len(arguments) != 3 {
		return fmt.Errorf("serve :PORT, call ADDRESS N or hold ADDRESS SECONDS")
	}
	number, err := strconv.Atoi(arguments[2])
	if err != nil {
		return err
	}
	switch arguments[0] {
	case "call":
		for call := 0; call < number; call++ {
			if err := once(arguments[1]); err != nil {
				return fmt.Errorf("call %d: %w", call, err)
			}
		}
		fmt.Println("calls:", number)
		return nil
	case "hold":
		return hold(arguments[1], time.Duration(number)*time.Second)
	}
	return fmt.Errorf("no command %s", arguments[0])
}

func serve(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	checks := health.NewServer()
	checks.SetServingStatus("", api.HealthCheckResponse_SERVING)
	api.RegisterHealthServer(server, checks)
	return server.Serve(listener)
}

func dial(address string) (*grpc.ClientConn, error) {
	// A call is never made twice: a connection that ends is an error that is seen.
	return grpc.NewClient("dns:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
}

func check(client api.HealthClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	answer, err := client.Check(ctx, &api.HealthCheckRequest{})
	if err != nil {
		return err
	}
	if answer.Status != api.HealthCheckResponse_SERVING {
		return fmt.Errorf("the server is %s", answer.Status)
	}
	return nil
}

func once(address string) error {
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	return check(api.NewHealthClient(connection))
}

func hold(address string, duration time.Duration) error {
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	client := api.NewHealthClient(connection)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := client.Watch(ctx, &api.HealthCheckRequest{})
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				ended <- err
				return
			}
		}
	}()
	calls := 0
	for deadline := time.Now().Add(duration); time.Now().Before(deadline); calls++ {
		if err := check(client); err != nil {
			return fmt.Errorf("call %d: %w", calls, err)
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the stream ended after %d calls: %w", calls, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	fmt.Println("held through calls:", calls)
	return nil
}
