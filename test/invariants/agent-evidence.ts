import type { Agent } from '@fleetkey/device-agent/agent.ts'
import type { DeviceEvidence } from './evidence.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

/** Evidence of an agent in this process. */
export const evidenceOf = (device: string, agent: Agent): DeviceEvidence => ({
  device,
  status: agent.status(),
  encrypt: async (key, plaintext) => Buffer.from((await agent.encrypt(key, bytes(plaintext))).ciphertext).toString('base64'),
  decrypt: async (key, ciphertext) => Buffer.from(agent.decrypt(key, Buffer.from(ciphertext, 'base64')).plaintext).toString(),
  mac: async (key, data) => {
    const { epoch, mac } = await agent.mac(key, bytes(data))
    return { epoch, mac: Buffer.from(mac).toString('base64') }
  },
  verify: async (key, epoch, data, mac) => await agent.verify(key, epoch, bytes(data), Buffer.from(mac, 'base64')),
})
