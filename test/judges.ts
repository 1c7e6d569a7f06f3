import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'

/** Programs that judge our work, and Debian's package of each. */
export const judges = {
  swtpm: 'swtpm',
  swtpm_setup: 'swtpm-tools',
  socat: 'socat',
  tpm2_quote: 'tpm2-tools',
  tpm2_checkquote: 'tpm2-tools',
  tpm2_eventlog: 'tpm2-tools',
  mosquitto: 'mosquitto',
  mosquitto_sub: 'mosquitto-clients',
  openssl: 'openssl',
  certtool: 'gnutls-bin',
  // Its elliptic curves are in the plugins.
  pki: 'strongswan-pki libstrongswan-standard-plugins',
  curl: 'curl',
  'softhsm2-util': 'softhsm2',
  // Builds what reaches a PKCS#11 token.
  'c++': 'g++',
} as const

const found = (program: string): boolean =>
  (process.env['PATH'] ?? '')
    .split(':')
    .concat('/usr/sbin', '/sbin')
    .some((folder) => existsSync(`${folder}/${program}`))
const isDebian = (): boolean => existsSync('/etc/debian_version') && readFileSync('/etc/os-release', 'utf8').includes('debian')

/** Installs what is missing from Debian's packages when that is possible (root on Debian); says what is missing otherwise. */
export const installJudges = (): void => installPrograms(judges, 'tests that need them are skipped')

/** The same for any programs and Debian's packages of them. `without`: what becomes of it where they cannot be installed. */
export const installPrograms = (programs: Readonly<Record<string, string>>, without: string): void => {
  const missing = Object.entries(programs).flatMap(([program, name]) => (found(program) ? [] : name.split(' ')))
  if (missing.length === 0) return
  const packages = [...new Set(missing)]
  if (process.getuid?.() !== 0 || !isDebian()) {
    console.error(`missing programs (${without}): apt-get install ${packages.join(' ')}`)
    return
  }
  console.error(`installing ${packages.join(' ')} …`)
  // Debian starts a mosquitto of its own on 1883 when it is installed; nobody here wants it.
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', RUNLEVEL: '1' }
  for (const args of [
    ['update', '-qq'],
    ['install', '-y', '-qq', '--no-install-recommends', ...packages],
  ]) {
    const done = spawnSync('apt-get', args, { env, encoding: 'utf8' })
    if (done.status !== 0) console.error(`apt-get ${args.join(' ')} failed: ${done.stderr}`)
  }
}
