import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { request } from 'node:https'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { newTlsKey, tlsCsr, type TlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { Unreachable, type Client } from '@fleetkey/cli/client.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { certificatesIn } from './est-answer.ts'
import { auditIsWhole, certificatesWereIntended, identitiesAreUnique } from './invariants/invariants.ts'
import { freePort } from './ports.ts'
import { openWorld } from './world.ts'

/** Certificates of the server's own that are made before: its CAs, four message keys, TLS. */
const own = 7

/**
 * A device enrols by token and renews three times over EST while the server is killed at one durable step; whoever hears no answer asks again, as EST clients do.
 * How often it was killed.
 */
const enrolKilled = async (at: string): Promise<number> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-est-'))
  const [mqtt, https, est] = [await freePort(), await freePort(), await freePort()]
  const args = ['--mqtt-port', String(mqtt), '--https-port', String(https), '--est-port', String(est)]
  const steps = join(folder, 'steps')
  const world = await openWorld({ folder, args, apart: true, fault: { FLEETKEY_KILL_AT: at, FLEETKEY_STEPS: steps } })
  const ca = world.bundle.trust.join('')
  const post = async (operation: string, key: TlsKey, by: { auth?: string; cert?: string; key?: string }): Promise<{ status: number; body: string }> =>
    await new Promise((resolve, reject) => {
      const { auth, ...tls } = by
      const headers = {
        'content-type': 'application/pkcs10',
        ...(auth === undefined ? {} : { authorization: `Basic ${Buffer.from(auth).toString('base64')}` }),
      }
      const asked = request(
        { host: '127.0.0.1', port: est, path: `/.well-known/est/${operation}`, method: 'POST', agent: false, ca, ...tls, headers },
        (response) => {
          let body = ''
          response.on('data', (chunk: Buffer) => (body += chunk.toString()))
          response.on('end', () => resolve({ status: response.statusCode ?? 0, body }))
          response.on('error', reject)
        },
      )
      asked.on('error', reject)
      void tlsCsr(key, 'pl-1').then((csr) => asked.end(Buffer.from(csr).toString('base64')), reject)
    })
  const certificate = async (...of: Parameters<typeof post>): Promise<string> => {
    for (const end = Date.now() + 60_000; ;) {
      try {
        const { status, body } = await post(...of)
        expect({ status, body }).toMatchObject({ status: 200 })
        return certificatesIn(body)[0] ?? ''
      } catch (thrown) {
        if (!(thrown instanceof Error) || !('code' in thrown) || Date.now() > end) throw thrown
        await new Promise((resolve) => void setTimeout(resolve, 50))
      }
    }
  }
  const asked = async <R>(act: (client: Client) => Promise<R>): Promise<R> =>
    await act(world.client).catch(async (thrown: unknown) => {
      if (thrown instanceof Unreachable) return await act(world.client)
      throw thrown
    })
  try {
    const batch = await world.enlist([{ serial: 'PL-1' }], 'plant')
    let key = newTlsKey()
    const auth = `pl-1:${await world.token(batch)}`
    let cert = await certificate('simpleenroll', key, { auth })
    for (let renewals = 0; renewals < 2; renewals++) {
      const next = newTlsKey()
      cert = await certificate('simplereenroll', next, { cert, key: key.private.export({ format: 'pem', type: 'pkcs8' }) as string })
      key = next
    }
    const shown = await asked(async (client) => await client.call('device.show', { params: { id: 'pl-1' } }))
    expect(shown).toMatchObject({ state: 'enrolled', method: 'token' })
    // Whatever was answered is the newest of the record.
    expect(shown.certificates.map(({ pem }) => pem.replace(/\s/g, ''))).toContain(cert.replace(/\s/g, ''))
    let log = ''
    await world.client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await world.client.call('audit.key')).spki, 'base64')
    await world.server.stop()
    const store = await openSqliteStore(join(folder, 'server', 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
    try {
      const evidence = { store, devices: [], history: [], log, auditKey }
      for (const invariant of [certificatesWereIntended, identitiesAreUnique, auditIsWhole]) await invariant(evidence)
      expect(await store.find('intent', { where: { unissued: 'open' }, limit: 10 })).toEqual([])
    } finally {
      await store.close()
    }
    const [name, count = '1'] = at.split('#')
    return readFileSync(steps, 'utf8')
      .trim()
      .split('\n')
      .filter((step) => step === name).length >= Number(count)
      ? 1
      : 0
  } finally {
    await world.stop()
    if (existsSync(folder)) rmSync(folder, { recursive: true, force: true })
  }
}

describe('kill -9 of the server while a device enrols and renews over EST, at', { timeout: 120_000 }, () => {
  const points = ['est.issued', 'est.renewed', `issue.signed#${own + 2}`, 'est.renewed#2']
  test.for(process.env['FLEETKEY_LONG'] === '1' ? points : points.slice(0, 2))('%s', async (at) => expect(await enrolKilled(at)).toBe(1))
})
