// The plant's own MQTT broker, which Fleetkey is not part of: plain TCP, no rights, sees whatever devices exchange.
import { createServer, type AddressInfo } from 'node:net'
import { Aedes } from 'aedes'

/** Starts the plant's broker on loopback. `seen` collects every payload that passed. */
export const startPlant = async (): Promise<{ port: number; seen: Buffer[]; stop: () => Promise<void> }> => {
  const broker = await Aedes.createBroker()
  const seen: Buffer[] = []
  broker.on('publish', (packet, client) => {
    if (client !== null) seen.push(Buffer.from(packet.payload))
  })
  const server = createServer(broker.handle)
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  return {
    port: (server.address() as AddressInfo).port,
    seen,
    stop: async () => {
      await new Promise<void>((resolve) => void broker.close(() => resolve()))
      server.close()
    },
  }
}
