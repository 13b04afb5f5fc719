// Package gatewaytest runs ingesters and history inside a test, with a gateway's
// storage over them. Samples go in over the ship protocol and come out over the
// fetch protocol and from blocks, through gRPC on connections in memory, so that
// a test may run in a bubble of testing/synctest.
package gatewaytest
