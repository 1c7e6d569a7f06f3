import { spawn, spawnSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { Agent, request } from 'node:http'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { cpuOf } from './cpu.ts'
import { freePort } from '../test/ports.ts'

/** Requests that `cfssl serve` has answered with a certificate: a second by the clock, and a CPU second of its process. */
export interface CfsslRate {
  readonly wall: number
  readonly cpu: number
}

/** One running `cfssl serve` with a P-256 CA of its own on the disk. */
export interface Cfssl {
  /** Has each request (DER) signed over HTTP, so many in flight on kept connections. Throws when one is not. */
  sign(csrs: readonly Uint8Array[], atOnce: number): Promise<CfsslRate>
  stop(): Promise<void>
}

/** The table that cfssl's own migrations make for SQLite. */
const certificates = `CREATE TABLE certificates (serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, ca_label blob, status blob NOT NULL,
  reason int, expiry timestamp, revoked_at timestamp, pem blob NOT NULL, PRIMARY KEY (serial_number, authority_key_identifier))`

const post = async (agent: Agent, port: number, body: string): Promise<string> =>
  await new Promise((resolve, reject) => {
    const sent = request({ agent, port, host: '127.0.0.1', method: 'POST', path: '/api/v1/cfssl/sign' }, (response) => {
      const chunks: Buffer[] = []
      response.on('data', (chunk: Buffer) => void chunks.push(chunk))
      response.once('error', reject)
      response.once('end', () => resolve(Buffer.concat(chunks).toString()))
    })
    sent.once('error', reject)
    sent.end(body)
  })

const configure = (folder: string, stored: boolean): readonly string[] => {
  mkdirSync(folder, { mode: 0o700 })
  const file = (name: string, content: string): string => {
    writeFileSync(join(folder, name), content, { mode: 0o600 })
    return join(folder, name)
  }
  const order = JSON.stringify({ CN: 'bench', key: { algo: 'ecdsa', size: 256 } })
  const { stdout } = spawnSync('cfssl', ['genkey', '-loglevel', '5', '-initca', '-'], { input: order, encoding: 'utf8' })
  const { cert, key } = JSON.parse(stdout) as { readonly cert: string; readonly key: string }
  const config = { signing: { default: { expiry: '2160h', usages: ['digital signature', 'client auth'] } } }
  const args = ['-ca', file('ca.pem', cert), '-ca-key', file('ca-key.pem', key), '-config', file('config.json', JSON.stringify(config))]
  if (!stored) return args
  const path = join(folder, 'certificates.db')
  const database = new DatabaseSync(path)
  database.exec('PRAGMA journal_mode = WAL')
  database.exec(certificates)
  database.close()
  return [...args, '-db-config', file('db.json', JSON.stringify({ driver: 'sqlite3', data_source: `${path}?_busy_timeout=60000` }))]
}

/** `stored`: it keeps each certificate in an SQLite database before it answers; otherwise it keeps nothing. Undefined where cfssl is not installed. */
export const startCfssl = async (folder: string, stored: boolean): Promise<Cfssl | undefined> => {
  if (spawnSync('cfssl', ['version']).error !== undefined) return undefined
  const port = await freePort()
  const args = ['serve', '-loglevel', '3', '-address', '127.0.0.1', '-port', String(port), ...configure(folder, stored)]
  const child = spawn('cfssl', args, { stdio: 'ignore' })
  const exited = new Promise((resolve) => void child.once('exit', resolve))
  const { pid } = child
  if (pid === undefined) throw new Error('cfssl did not start')
  const agent = new Agent({ keepAlive: true })
  const stop = async (): Promise<void> => {
    agent.destroy()
    child.kill()
    await exited
  }
  try {
    for (let tries = 0; ; tries++) {
      const answer = await post(agent, port, '{}').catch(() => undefined)
      if (answer !== undefined) break
      if (tries > 100) throw new Error('cfssl does not answer')
      await new Promise((resolve) => void setTimeout(resolve, 100))
    }
  } catch (error) {
    await stop()
    throw error
  }
  return {
    async sign(csrs, atOnce) {
      const bodies = csrs.map((csr) => JSON.stringify({ certificate_request: toPem('CERTIFICATE REQUEST', csr) }))
      const [before, started] = [cpuOf(pid), performance.now()]
      let next = 0
      const worker = async (): Promise<void> => {
        for (let body = bodies[next++]; body !== undefined; body = bodies[next++]) {
          const answer = await post(agent, port, body)
          if (!answer.startsWith('{"success":true')) throw new Error(`cfssl: ${answer.slice(0, 200)}`)
        }
      }
      await Promise.all(Array.from({ length: atOnce }, worker))
      const per = (milliseconds: number): number => (csrs.length * 1000) / milliseconds
      return { wall: per(performance.now() - started), cpu: per(cpuOf(pid) - before) }
    },
    stop,
  }
}
